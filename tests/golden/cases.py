"""The golden requests: messages in the usual chat form, media named relative to tests/fixtures/media."""

import media


def image(name: str) -> dict:
    return {"type": "image_url", "image_url": {"url": name}}


def video(name: str, fps: float) -> dict:
    return {"type": "video", "video": media.frame_names(name), "fps": fps}


def text(value: str) -> dict:
    return {"type": "text", "text": value}


CASES = {
    "text": [
        {"role": "system", "content": "You are terse."},
        {"role": "user", "content": "Name 3 things: café, 你好, x1."},
    ],
    "image_odd": [
        {"role": "user", "content": [image("odd_97x131.png"), text("What is this?")]},
    ],
    "images": [
        {"role": "user", "content": [
            text("First "), image("tall_150x262.png"), text(" then "), image("square_98x126.png"),
            image("tiny_9x7.png"), text(" compare them.")]},
    ],
    "video": [
        {"role": "user", "content": [video("walk", 3.0), text("What happens?")]},
    ],
    "video_slow": [
        {"role": "user", "content": [text("Look: "), video("slow", 0.7), text("What happens next?")]},
    ],
    "multi_turn": [
        {"role": "system", "content": "Answer in one word."},
        {"role": "user", "content": [image("wide_70x42.png"), text("Colour?")]},
        {"role": "assistant", "content": "Red."},
        {"role": "user", "content": [video("turn", 0.7), text("Moving, or like "), image("tiny_9x7.png"), text("?")]},
    ],
}
SETS = {
    "tiny": ["text", "image_odd", "images", "video", "video_slow", "multi_turn"],
    "tiny-nested": ["text", "image_odd", "images", "video", "video_slow", "multi_turn"],
    "real-heads": ["text", "images", "multi_turn"],
    "small-margin": ["text", "image_odd", "multi_turn"],
}
ALL_LOGITS = "text"  # the case that also keeps the logits of every prompt position
STEPS = 32


def items_of(messages: list) -> list[dict]:
    found = []
    for message in messages:
        for part in message["content"] if isinstance(message["content"], list) else []:
            if part["type"] == "image_url":
                found.append({"kind": "image", "files": [part["image_url"]["url"]], "fps": None})
            elif part["type"] == "video":
                found.append({"kind": "video", "files": part["video"], "fps": part["fps"]})
    return found
