"""Texts for the tokenizer table and conversations for the template table."""

import json

import template

TEXTS = [
    "", " ", "  ", "\n", "\n\n \n", "\t\tx", "Hello, world!", " Hello  world ", "HELLO'S isn't WE'LL they'Re i'm",
    "1234567890", "3.14159 and 2,718", "x1y22z333", "a b", "trailing   ", "   leading", "line1\nline2\r\nline3\r",
    "tabs\tand\u00a0nbsp\u2003em", "café", "cafe\u0301", "A\u030angstro\u0308m \u212b", "ﬁ ligature ½ ²",
    "你好，世界！", "日本語のテキスト、カタカナ", "한국어 텍스트", "\u1112\u1161\u11ab", "Привет, мир", "مرحبا بالعالم",
    "שלום עולם", "हिन्दी में", "ไทย", "👋🏽", "👨‍👩‍👧‍👦 family", "🇫🇷🇯🇵", "a👍b", "\u200b\u200dzero", "\ufeffbom",
    "def f(x):\n    return x ** 2  # squared\n", "for (int i = 0; i < n; ++i) { a[i] += 1; }", "SELECT * FROM t WHERE a<>'b';",
    "{\"key\": [1, 2.5, null, true]}", "https://example.org/a?b=c&d=%20#e", "<b>bold</b> &amp; more", "snake_case camelCase",
    "... --- !!! ???", "=====\n-----\n", "x = y\n\n\n\nz", "\U0001F9D1\u200D\U0001F680 in space", "\u0000\u0001\u007f",
    "<|im_start|>user\nhi<|im_end|>\n", "<|vision_start|><|image_pad|><|vision_end|>", "<|video_pad|>x<|vision_pad|>",
    "<tool_call>\n{\"name\": \"f\"}\n</tool_call>", "<|endoftext|><|fim_prefix|>a<|fim_suffix|>b<|fim_middle|>",
    "<|object_ref_start|>cat<|object_ref_end|><|box_start|>(1,2)<|box_end|>", "<|im_start", "<|IM_START|>",
    "system user assistant tool", "The quick brown fox jumps over the lazy dog.", "ÀÉÎÕÜ àéîõü ß ẞ", "𝔘𝔫𝔦𝔠𝔬𝔡𝔢 𝟙𝟚𝟛",
    "Ⅳ ④ ٣", "naïve coöperation", "a\u0300\u0316b", "word" * 20, "9" * 30, "é" * 10,
]

WEATHER = {"type": "function", "function": {
    "name": "get_weather", "description": "Wetter für <city> & \"more\"",
    "parameters": {"type": "object", "properties": {"city": {"type": "string"}, "days": {"type": "integer"}},
                   "required": ["city"]}}}
CLOCK = {"type": "function", "function": {"name": "clock", "parameters": {"type": "object", "properties": {}}}}
IMAGE_URL = {"type": "image_url", "image_url": {"url": "a.png"}}
IMAGE = {"type": "image", "image": "b.png"}
VIDEO = {"type": "video", "video": ["c.png", "d.png"], "fps": 1.0}


def text(value: str) -> dict:
    return {"type": "text", "text": value}


def call(name: str, arguments) -> dict:
    return {"id": "call_1", "type": "function", "function": {"name": name, "arguments": arguments}}


MIXED = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": [text("A "), IMAGE_URL, text(" B "), VIDEO, IMAGE, text(" C")]},
    {"role": "assistant", "content": "Fine."},
    {"role": "user", "content": [VIDEO, IMAGE_URL, text("?")]},
]
TOOLED = [
    {"role": "user", "content": [IMAGE_URL, text("Weather here?")]},
    {"role": "assistant", "content": None,
     "tool_calls": [call("get_weather", {"city": "Zürich", "days": 2}), call("clock", {})]},
    {"role": "tool", "tool_call_id": "call_1", "content": "{\"temp\": 3}"},
    {"role": "tool", "tool_call_id": "call_2", "content": [text("12:00")]},
    {"role": "assistant", "content": "It is 3 degrees."},
    {"role": "user", "content": "Thanks"},
]
# (name, messages, tools, add_vision_id, add_generation_prompt)
CONVERSATIONS = [
    ("plain", [{"role": "user", "content": "Hi"}], None, False, True),
    ("no_generation_prompt", [{"role": "user", "content": "Hi"}], None, False, False),
    ("system", [{"role": "system", "content": "S"}, {"role": "user", "content": "Hi"}], None, False, True),
    ("system_as_parts", [{"role": "system", "content": [text("S"), text("T")]}, {"role": "user", "content": "Hi"}],
     None, False, True),
    ("late_system", [{"role": "user", "content": "Hi"}, {"role": "system", "content": "S"}], None, False, True),
    ("no_trimming", [{"role": "user", "content": "  Hi \n"}, {"role": "assistant", "content": " ok "}], None, False, True),
    ("empty_contents", [{"role": "user", "content": ""}, {"role": "assistant", "content": []}], None, False, True),
    ("literal_specials", [{"role": "user", "content": "<|im_end|> <|image_pad|>"}], None, False, True),
    ("one_image", [{"role": "user", "content": [IMAGE_URL, text("What?")]}], None, False, True),
    ("mixed", MIXED, None, False, True),
    ("mixed_vision_ids", MIXED, None, True, True),
    ("image_key_without_type", [{"role": "user", "content": [{"image": "x"}, {"text": "y"}, {"video": "z"}]}],
     None, True, True),
    ("tools_default_system", [{"role": "user", "content": "Hi"}], [WEATHER], False, True),
    ("tools_own_system", [{"role": "system", "content": "S"}, {"role": "user", "content": "Hi"}], [WEATHER, CLOCK],
     False, True),
    ("tools_conversation", TOOLED, [WEATHER, CLOCK], True, True),
    ("tools_pending_result", TOOLED[:4], [WEATHER, CLOCK], False, True),
    ("tools_history_without_list", TOOLED, None, False, True),
    ("tools_call_with_content", [{"role": "user", "content": "Hi"},
                                 {"role": "assistant", "content": "Let me see.", "tool_calls": [call("clock", {})]},
                                 {"role": "tool", "content": "noon"}], [CLOCK], False, True),
    ("tools_arguments_as_text", [{"role": "user", "content": "Hi"},
                                 {"role": "assistant", "content": "", "tool_calls": [call("clock", "{\"a\":1}")]}],
     [CLOCK], False, False),
]


def content_text(content, counts: dict, numbered: bool) -> str:
    if content is None or isinstance(content, str):
        return content or ""
    out = ""
    for part in content:
        kind = part.get("type")
        if kind == "image" or "image" in part or "image_url" in part:
            counts["Picture"] += 1
            out += f"Picture {counts['Picture']}: " if numbered else ""
            out += "<|vision_start|><|image_pad|><|vision_end|>"
        elif kind == "video" or "video" in part:
            counts["Video"] += 1
            out += f"Video {counts['Video']}: " if numbered else ""
            out += "<|vision_start|><|video_pad|><|vision_end|>"
        else:
            out += part["text"]
    return out


def plain(messages: list, tools, numbered: bool, generation: bool) -> str:
    """The same rules in plain Python, written apart from the template, to check it."""
    counts, out = {"Picture": 0, "Video": 0}, ""
    block = ""
    if tools:
        block = ("\n\n# Tools\n\nYou may call one or more functions to assist with the user query.\n\nYou are provided "
                 "with function signatures within <tools></tools> XML tags:\n<tools>")
        block += "".join("\n" + json.dumps(t, ensure_ascii=False) for t in tools)
        block += ("\n</tools>\n\nFor each function call, return a json object with function name and arguments within "
                  "<tool_call></tool_call> XML tags:\n<tool_call>\n{\"name\": <function-name>, \"arguments\": "
                  "<args-json-object>}\n</tool_call>")
    if messages[0]["role"] != "system":
        out += f"<|im_start|>system\nYou are a helpful assistant.{block}<|im_end|>\n"
    for k, message in enumerate(messages):
        role, body = message["role"], content_text(message["content"], counts, numbered)
        if role == "tool":
            before = k > 0 and messages[k - 1]["role"] == "tool"
            after = k + 1 < len(messages) and messages[k + 1]["role"] == "tool"
            out += ("" if before else "<|im_start|>user") + f"\n<tool_response>\n{body}\n</tool_response>"
            out += "" if after else "<|im_end|>\n"
            continue
        calls = message.get("tool_calls") or []
        out += f"<|im_start|>{role}" + ("\n" if body or not calls else "") + body
        out += block if k == 0 and role == "system" else ""
        for c in calls:
            arguments = c["function"]["arguments"]
            if not isinstance(arguments, str):
                arguments = json.dumps(arguments, ensure_ascii=False)
            out += f"\n<tool_call>\n{{\"name\": \"{c['function']['name']}\", \"arguments\": {arguments}}}\n</tool_call>"
        out += "<|im_end|>\n"
    return out + ("<|im_start|>assistant\n" if generation else "")


def template_rows() -> list:
    rows = []
    for name, messages, tools, numbered, generation in CONVERSATIONS:
        rendered = template.render(messages, tools, numbered, generation)
        assert rendered == plain(messages, tools, numbered, generation), (name, rendered)
        rows.append({"name": name, "messages": messages, "tools": tools, "add_vision_id": numbered,
                     "add_generation_prompt": generation, "rendered": rendered})
    return rows
