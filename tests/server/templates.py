"""Chat templates with tools and thoughts, as short as they come, in the three forms of Qwen's."""

_TURNS = """\
{%- for m in messages %}<|im_start|>{{ m.role }}
{% if m.reasoning_content %}<think>
{{ m.reasoning_content }}
</think>

{% endif %}{{ m.content }}{% for call in m.tool_calls or [] %}CALL{% endfor %}<|im_end|>
{% endfor %}"""
_TOOLS = "{% for tool in tools or [] %}{{ tool | tojson }}\n{% endfor %}"
_JSON = """
<tool_call>
{"name": "{{ call.function.name }}", "arguments": {{ call.function.arguments | tojson }}}
</tool_call>"""
_XML = """
<tool_call>
<function={{ call.function.name }}>
{% for key, value in call.function.arguments.items() %}<parameter={{ key }}>
{{ value }}
</parameter>
{% endfor %}</function>
</tool_call>"""
_BEGIN = "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
_CLOSED = "{% if add_generation_prompt and enable_thinking is false %}<think>\n\n</think>\n\n{% endif %}"
_OPEN = "{% if add_generation_prompt %}<think>\n{% endif %}"

#: An answer may begin with a thought; tool calls are JSON.
JSON = _TOOLS + _TURNS.replace("CALL", _JSON) + _BEGIN + _CLOSED
#: The prompt begins the thought; tool calls are XML.
XML = _TOOLS + _TURNS.replace("CALL", _XML) + _BEGIN + _OPEN
#: Neither thoughts nor tools.
PLAIN = "{% for m in messages %}[{{ m.role }}] {{ m.content }}\n{% endfor %}"
