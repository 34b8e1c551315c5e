"""How model families write tool calls and reasoning, and what OpenAI's API makes of it.

One request: ``tools = check_tools(...)``, ``prompt = chat.render(**dialect.inputs(messages,
tools))``, ``dialect.response_format(prompt, tools)`` constrains the sampling if a call is required,
and ``dialect.parser(prompt, tools)`` reads the output while it is generated.
"""

from kvant.server.dialects.deltas import Answer, Delta, OutputParser, ToolDelta, call_id
from kvant.server.dialects.families import DIALECTS, Dialect, dialect_of
from kvant.server.dialects.tools import Function, Tools, check_tools

__all__ = [
    "DIALECTS",
    "Answer",
    "Delta",
    "Dialect",
    "Function",
    "OutputParser",
    "ToolDelta",
    "Tools",
    "call_id",
    "check_tools",
    "dialect_of",
]
