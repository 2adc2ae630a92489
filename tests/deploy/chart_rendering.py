"""Renders the chart without Helm: the part of Go's template language, and of its functions, that it uses."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import yaml

_WORD = re.compile(r'"[^"]*"|\S+')


@dataclass
class Node:
    """Text, an expression, or a block with its two halves."""

    kind: str
    text: str = ""
    then: list[Node] = field(default_factory=list)
    otherwise: list[Node] = field(default_factory=list)


class Chart:
    """Templates by name; ``context`` has Values, Release and Chart.

    Raises:
        ValueError: a block without an end, an unknown word, or a value that is not there.
    """

    def __init__(self, context: dict[str, Any]) -> None:
        self.context = context
        self.named: dict[str, list[Node]] = {}
        self.functions: dict[str, Callable[..., Any]] = {
            "include": lambda name, dot: self._run(self.named[name], dot),
            "nindent": lambda width, text: "\n" + "\n".join(" " * width + line for line in str(text).split("\n")),
            "toYaml": lambda value: yaml.safe_dump(value, sort_keys=True).strip().removesuffix("\n..."),
            "toJson": json.dumps,
            "quote": lambda value: json.dumps(str(value)),
            "sha256sum": lambda text: hashlib.sha256(text.encode()).hexdigest(),
            "ne": lambda one, other: one != other,
        }

    def render(self, text: str) -> str:
        return self._run(self._parse(text), self.context)

    def _parse(self, text: str) -> list[Node]:
        root = Node("root")
        stack, into = [root], [root.then]
        at, trim = 0, False

        def say(piece: str) -> None:
            into[-1].append(Node("text", piece))

        for match in re.finditer(r"\{\{(-?)\s*(.*?)\s*(-?)\}\}", text, re.DOTALL):
            piece = text[at : match.start()]
            piece = piece.lstrip() if trim else piece
            say(piece.rstrip() if match[1] else piece)
            at, trim = match.end(), bool(match[3])
            word, _, rest = match[2].partition(" ")
            if word in ("if", "with", "range", "define"):
                node = Node(word, rest.strip())
                into[-1].append(node)
                stack.append(node)
                into.append(node.then)
            elif word == "else":
                into[-1] = stack[-1].otherwise
            elif word == "end":
                if len(stack) == 1:
                    raise ValueError("an end without a beginning")
                into.pop()
                done = stack.pop()
                if done.kind == "define":
                    self.named[json.loads(done.text)] = done.then
            else:
                into[-1].append(Node("value", match[2]))
        if len(stack) > 1:
            raise ValueError(f"{stack[-1].kind} {stack[-1].text} has no end")
        say(text[at:].lstrip() if trim else text[at:])
        return root.then

    def _run(self, nodes: list[Node], dot: Any) -> str:
        out = []
        for node in nodes:
            if node.kind == "text":
                out.append(node.text)
            elif node.kind == "value":
                out.append(str(self._value(node.text, dot)))
            elif node.kind != "define":
                found = self._value(node.text, dot)
                if node.kind == "range":
                    out += [self._run(node.then, one) for one in found]
                elif found:
                    out.append(self._run(node.then, found if node.kind == "with" else dot))
                else:
                    out.append(self._run(node.otherwise, dot))
        return "".join(out)

    def _value(self, expression: str, dot: Any) -> Any:
        found: list[Any] = []
        for part in expression.split(" | "):
            first, *words = _WORD.findall(part)
            arguments = [self._word(word, dot) for word in words] + found
            if first in self.functions:
                found = [self.functions[first](*arguments)]
            elif arguments:
                raise ValueError(f"{first} is no function that is known here")
            else:
                found = [self._word(first, dot)]
        return found[0]

    def _word(self, word: str, dot: Any) -> Any:
        if word == ".":
            return dot
        if word.startswith('"') or word.isdecimal():
            return json.loads(word)
        if not word.startswith("."):
            raise ValueError(f"{word} is not known here")
        for name in word[1:].split("."):
            if name not in dot:
                raise ValueError(f"{word}: there is no {name}")
            dot = dot[name]
        return dot
