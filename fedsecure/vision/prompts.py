"""Class names → prompts, by one rule: the name goes into the template's ``{}`` exactly as the federation spells it.

Underscores stay, as in the FACMIC code ("a picture of a no_tumor"). The tiny CLIP was captioned with and without
them. Every site computes the same prompts from the federation's public settings.
"""

from __future__ import annotations

from collections.abc import Sequence

from fedsecure.errors import ModelError

DEFAULT_TEMPLATE = "a picture of a {}"


def class_prompts(classes: Sequence[str], *, template: str = DEFAULT_TEMPLATE) -> tuple[str, ...]:
    """One prompt a class, in order.

    Args:
        classes: class names.
        template: text with exactly one ``{}``; other braces stand for themselves.

    Raises:
        ModelError: FS-1609 the template has no ``{}``, or more than one.
    """
    if template.count("{}") != 1:
        raise ModelError(
            "FS-1609",
            f"prompt template {template!r}",
            expected="exactly one {} for the class name",
            cure='mend "prompt" in the [encoder] section of federation.toml',
        )
    return tuple(template.replace("{}", name) for name in classes)
