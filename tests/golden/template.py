"""Renders the chat template the way transformers does."""

from pathlib import Path

from transformers.utils.chat_template_utils import render_jinja_template

SOURCE = Path(__file__).with_name("chat_template.jinja").read_text(encoding="utf-8").rstrip("\n")


def render(messages: list, tools: list | None = None, add_vision_id: bool = False, generation: bool = True) -> str:
    rendered, _ = render_jinja_template(
        conversations=[messages], tools=tools, chat_template=SOURCE,
        add_generation_prompt=generation, add_vision_id=add_vision_id)
    return rendered[0]
