"""Many adapters of any method answering from one base: the engine, its HTTP interface, and a page."""
