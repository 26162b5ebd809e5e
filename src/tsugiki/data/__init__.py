"""From files to tokens: rows, conversations, ids with their trained mask; each stage a plain function."""
from tsugiki.data.conversation import Columns, Conversation, Message, load_conversations
from tsugiki.data.render import DEFAULT_TEMPLATE, Example, Renderer, Report
from tsugiki.data.rows import Problem, Row, read
from tsugiki.data.split import Duplicates, duplicates, split

__all__ = ["Columns", "Conversation", "DEFAULT_TEMPLATE", "Duplicates", "Example", "Message", "Problem", "Renderer",
           "Report", "Row", "duplicates", "load_conversations", "read", "split"]
