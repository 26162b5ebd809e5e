"""Many adapters on one base, answering many requests at once: the engine, and the HTTP server before it."""
