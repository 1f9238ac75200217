"""A chat tokenizer of bytes, for tests: a token for each byte, and one that ends a message or a text."""

from __future__ import annotations

from workloads.data.dialogues import Message, Prompt

END = 256


class ByteChat:
    """What `workloads.data.chat.ChatTokenizer` offers, on bytes."""

    end_ids, identity = (END,), "bytes"
    end_of_text, vocab_size, fingerprint = END, END + 1, "bytes"

    def encode(self, text: str) -> list[int]:
        return list(text.encode())

    def prompt(self, prompt: Prompt) -> list[int]:
        return self.encode(prompt) if isinstance(prompt, str) else [*self.conversation(prompt)[0], ord(">")]

    def sequence(self, prompt: Prompt, answer: str) -> tuple[list[int], list[bool]]:
        if not isinstance(prompt, str):
            return self.conversation([*prompt, {"role": "assistant", "content": answer}])
        before, after = self.encode(prompt), [*self.encode(answer), END]
        return [*before, *after], [False] * len(before) + [True] * len(after)

    def conversation(self, messages: list[Message]) -> tuple[list[int], list[bool]]:
        ids: list[int] = []
        answer: list[bool] = []
        for message in messages:
            role, content = self.encode(message["role"][0] + ">"), [*self.encode(message["content"]), END]
            ids += role + content
            answer += [False] * len(role) + [message["role"] == "assistant"] * len(content)
        return ids, answer
