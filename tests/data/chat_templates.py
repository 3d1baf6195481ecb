"""Chat templates of several kinds, all of the same small language of control tokens."""

CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
# The same text, with the assistant's part marked.
CHATML_MARKED = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' }}"
    "{% if m['role'] == 'assistant' %}{% generation %}{{ m['content'] + '<|im_end|>' }}{% endgeneration %}"
    "{% else %}{{ m['content'] + '<|im_end|>' }}{% endif %}{{ '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
# Marks the content only: the end of turn stands after the mark.
CHATML_HALF_MARKED = CHATML_MARKED.replace(
    "{{ m['content'] + '<|im_end|>' }}{% endgeneration %}", "{{ m['content'] }}{% endgeneration %}{{ '<|im_end|>' }}"
)
# Writes an empty thought into the last assistant turn only, as some reasoning models do.
THINKING = CHATML.replace(
    "m['content'] + '<|im_end|>\n'",
    "('<t></t>' if m['role'] == 'assistant' and loop.last else '') + m['content'] + '<|im_end|>\n'",
)
# Opens a thought when asked to generate, but writes none with the answer: what is generated cannot be told.
OPEN_THOUGHT = CHATML.replace("'<|im_start|>assistant\n' }}{% endif %}", "'<|im_start|>assistant\n<t>' }}{% endif %}")
ALTERNATING = (
    "{% for m in messages %}{% if (m['role'] == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('roles must alternate') }}{% endif %}{% endfor %}" + CHATML
)
ENDLESS = (
    "{% for m in messages %}{{ m['role'] + ': ' + m['content'] }}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'assistant: ' }}{% endif %}"
)
# The end of the text stands after the last turn only.
CLOSED_TEXT = CHATML.replace("{% endif %}", "{% else %}{{ eos_token }}{% endif %}")
# Marks the newline after the end of turn too.
OVERMARKED = CHATML_MARKED.replace(
    "'<|im_end|>' }}{% endgeneration %}", "'<|im_end|>\n' }}{% endgeneration %}"
).replace("{% endif %}{{ '\n' }}{% endfor %}", "{{ '\n' }}{% endif %}{% endfor %}")
# Writes the system message only while a user's turn is the last: it is gone as soon as there is an answer.
FORGETFUL = "{% if messages[-1]['role'] != 'user' %}{% set messages = messages[1:] %}{% endif %}" + CHATML
