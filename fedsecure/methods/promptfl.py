"""PromptFL: the words in front of the class names are learned, through CLIP's frozen text tower.

Guo et al.: PromptFL, IEEE TMC 2023 (arXiv 2208.11625), on CoOp (Zhou et al., IJCV 2022). One context serves all
classes, the fewest numbers to noise, and starts at the federation's own template, so that round 0 equals zero-shot
CLIP. Per-record cross-entropy, as in the original, so differential privacy needs no other loss.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from fedsecure.config import RunSettings
from fedsecure.learning.features import SiteFeatures
from fedsecure.learning.towers import TowerSpec, prompt_misfit, prompt_spec
from fedsecure.methods.towers import TowerDescent, encoder_of

if TYPE_CHECKING:
    from fedsecure.learning.tower_task import TowerTask

# Learned words at most: all that "a picture of a" has.
WORDS = 4


@dataclass(frozen=True, slots=True)
class PromptFL(TowerDescent):
    """Descent on the context in front of the class names."""

    def spec(self, settings: RunSettings) -> TowerSpec:
        """The template's last words before the class name, at most ``WORDS``.

        Raises:
            ModelError: FS-1671 an encoder without towers, FS-1673 a template that begins with the class name.
        """
        encoder = settings.encoder
        # A word is a token or more, so the text tower sees at least as many.
        words = len(encoder.prompt.split("{}")[0].split())
        if not words:
            raise prompt_misfit(f"prompt template {encoder.prompt!r}", "a word or more, to be learned, in front of {}")
        return prompt_spec(
            encoder.model, classes=len(settings.classes), contexts="shared", length=min(WORDS, words), at_template=True
        )

    def task(self, settings: RunSettings, features: SiteFeatures) -> TowerTask:  # type: ignore[override]
        """The prompts with the run's constants; ModelError FS-1673 where the tokens do not fit the template."""
        from fedsecure.learning.prompt_module import make_prompts, prompt_task

        spec, encoder = self.spec(settings), encoder_of(features)
        prompts = make_prompts(
            encoder.tokenizer,
            settings.classes,
            template=settings.encoder.prompt,
            length=spec.shapes["context"][0],
            at_template=True,
        )
        return prompt_task(encoder.network, prompts, spec=spec, head=self.zero_shot(settings, features))


METHOD = PromptFL(name="promptfl", version="1", kind="linear", longest=40.0, caution=6.0)
