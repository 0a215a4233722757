"""Built-in chat templates in Jinja, written by us from the formats that the models' makers document."""

from __future__ import annotations

_TURNS = "{% for message in messages %}"
_END = "{% endfor %}"
_SYSTEM_FIRST = (
    "{% if messages and messages[0]['role'] == 'system' %}"
    "{% set system = messages[0]['content'] | trim %}{% set messages = messages[1:] %}"
    "{% else %}{% set system = '' %}{% endif %}"
)

BUILT_IN = {
    "chatml": _TURNS
    + "{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>' + '\\n' }}"
    + _END
    + "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}",
    "llama3": "{{ bos_token }}"
    + _TURNS
    + "{{ '<|start_header_id|>' + message['role'] + '<|end_header_id|>\\n\\n'"
    + " + message['content'] | trim + '<|eot_id|>' }}"
    + _END
    + "{% if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}{% endif %}",
    "mistral": _SYSTEM_FIRST
    + "{{ bos_token }}"
    + _TURNS
    + "{% if message['role'] == 'user' %}"
    + "{{ '[INST] ' + (system + '\\n\\n' if loop.first and system else '') + message['content'] + ' [/INST]' }}"
    + "{% else %}{{ ' ' + message['content'] | trim + eos_token }}{% endif %}"
    + _END,
    "alpaca": _SYSTEM_FIRST
    + "{% if system %}{{ system + '\\n\\n' }}{% endif %}"
    + _TURNS
    + "{% if message['role'] == 'user' %}{{ '### Instruction:\\n' + message['content'] | trim + '\\n\\n' }}"
    + "{% else %}{{ '### Response:\\n' + message['content'] | trim + eos_token + '\\n\\n' }}{% endif %}"
    + _END
    + "{% if add_generation_prompt %}{{ '### Response:\\n' }}{% endif %}",
    "gemma": _SYSTEM_FIRST
    + "{{ bos_token }}"
    + _TURNS
    + "{{ '<start_of_turn>' + ('model' if message['role'] == 'assistant' else message['role']) + '\\n'"
    + " + (system + '\\n\\n' if loop.first and system else '') + message['content'] | trim + '<end_of_turn>\\n' }}"
    + _END
    + "{% if add_generation_prompt %}{{ '<start_of_turn>model\\n' }}{% endif %}",
}


def is_literal(text: str) -> bool:
    """Whether a recipe's `chat_template` is a Jinja text and not a name."""
    return "{" in text
