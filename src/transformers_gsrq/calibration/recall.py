"""What distillation reads: ordinary text, and windows that only exact recall can continue."""

from __future__ import annotations

import random
import string
from dataclasses import dataclass

import torch
from transformers import PreTrainedTokenizerBase

from ..text import windows_digest

# Half of a recall window's loss comes from the tokens that demand recall.
RECALL_WEIGHT = 0.5
HELD_OUT_WINDOWS = 4
SUBJECTS = "account badge cabinet device employee flight gate invoice locker member order parcel room station".split()
COPY_HEAD = "\n\nThe same passage once more, word for word:\n\n"


@dataclass(frozen=True)
class WeightedWindow:
    """A training window.

    Attributes:
        input_ids: int64 `[T]`.
        weights: float32 `[T]`, weight of the prediction made *at* each token; sums to 1.
    """

    input_ids: torch.Tensor
    weights: torch.Tensor

    @classmethod
    def plain(cls, input_ids: torch.Tensor) -> WeightedWindow:
        """All tokens alike."""
        return cls(input_ids, torch.full(input_ids.shape, 1 / input_ids.numel()))

    @classmethod
    def stressing(cls, input_ids: list[int], stressed: list[bool]) -> WeightedWindow:
        """Predictions *of* the stressed tokens share `RECALL_WEIGHT`, the others the rest."""
        # The prediction of token t + 1 is made at token t.
        mask = torch.tensor([*stressed[1:], False])
        weights = torch.where(
            mask, RECALL_WEIGHT / mask.sum().clamp(min=1), (1 - RECALL_WEIGHT) / (~mask).sum().clamp(min=1)
        )
        return cls(torch.tensor(input_ids), weights / weights.sum())


class TrainingData:
    """Windows to train on, to hold out, and to guard against learning the text instead of the model.

    Args:
        tokenizer: The model's tokenizer.
        windows: int64 `[windows, T]`; the last `HELD_OUT_WINDOWS` are held out, which calibration with the same seed
            reads last.
        guard: Windows `[T]` of text of another kind.
        recall_share: Share of the training windows that demand recall.
        batch_size: Windows of a step and process.
        seed: Of everything random.

    Raises:
        ValueError: if the windows are too short to demand recall.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        windows: torch.Tensor,
        guard: list[torch.Tensor],
        *,
        recall_share: float,
        batch_size: int,
        seed: int,
    ) -> None:
        self.tokenizer, self.recall_share, self.batch_size, self.seed = tokenizer, recall_share, batch_size, seed
        self.digest = windows_digest(windows)
        self.train, held_out = windows[:-HELD_OUT_WINDOWS], windows[-HELD_OUT_WINDOWS:]
        self.held_out = [WeightedWindow.plain(window) for window in held_out]
        if recall_share > 0:
            # So that a passage of a quarter of the window fits in twice, and the words between.
            least = 2 * (len(_encode(tokenizer, COPY_HEAD)) + 1)
            if windows.shape[1] < least:
                raise ValueError(
                    f"Windows of {windows.shape[1]} tokens are too short to demand recall: with this tokenizer "
                    f"window_length must be at least {least}, or recall_share 0."
                )
            generator = random.Random(seed)
            self.held_out += [self._recall(window, generator) for window in held_out]
        self.guard = [WeightedWindow.plain(window) for window in guard]

    def batch(self, step: int, process: int, num_processes: int) -> list[WeightedWindow]:
        """Windows of one step and process; depends on nothing else, so that a resumed run sees the same."""
        out = []
        for slot in range(self.batch_size):
            index = (step * num_processes + process) * self.batch_size + slot
            epoch, place = divmod(index, len(self.train))
            order = torch.randperm(len(self.train), generator=torch.Generator().manual_seed(epoch))
            window = self.train[order[place]]
            generator = random.Random(f"{self.seed} {index}")
            recall = generator.random() < self.recall_share
            out.append(self._recall(window, generator) if recall else WeightedWindow.plain(window))
        return out

    def _recall(self, window: torch.Tensor, generator: random.Random) -> WeightedWindow:
        return recall_window(self.tokenizer, window, window.numel(), generator)


def recall_window(
    tokenizer: PreTrainedTokenizerBase, text: torch.Tensor, length: int, generator: random.Random
) -> WeightedWindow:
    """One window that demands recall, of a random form.

    The wording differs from that of the retrieval benchmark on purpose.

    Args:
        tokenizer: The model's tokenizer.
        text: int64 `[T]` with T >= `length`, ordinary text to copy or to hide facts in.
        length: Tokens of the window.
        generator: Source of everything random.
    """
    make = generator.choice((_copied_passage, _facts, _identifiers))
    return make(tokenizer, text.tolist(), length, generator)


def _copied_passage(
    tokenizer: PreTrainedTokenizerBase, text: list[int], length: int, generator: random.Random
) -> WeightedWindow:
    link = _encode(tokenizer, COPY_HEAD)
    passage = generator.randint(length // 4, (length - len(link)) // 2)
    begin = length - len(link) - passage
    at = generator.randrange(begin - passage + 1)
    ids = [*text[:begin], *link, *text[at : at + passage]]
    return WeightedWindow.stressing(ids, [False] * (begin + len(link)) + [True] * passage)


def _facts(
    tokenizer: PreTrainedTokenizerBase, text: list[int], length: int, generator: random.Random
) -> WeightedWindow:
    pairs = {}
    for _ in range(max(2, length // 128)):
        name = f"{generator.choice(SUBJECTS)} {''.join(generator.choices(string.ascii_uppercase, k=2))}"
        pairs[name] = str(generator.randrange(10**4, 10**8))
    facts = [
        (f" Note: the code of {name} is {value}.", f"\nWhich code belongs to {name}? It is", f" {value}")
        for name, value in pairs.items()
    ]
    return _hide(tokenizer, text, facts, length, generator)


def _identifiers(
    tokenizer: PreTrainedTokenizerBase, text: list[int], length: int, generator: random.Random
) -> WeightedWindow:
    pairs = {}
    for _ in range(max(2, length // 128)):
        name = "_".join("".join(generator.choices(string.ascii_lowercase, k=4)) for _ in range(2))
        pairs[name] = f"{generator.randrange(16**8):08x}"
    facts = [(f'\n{name} = "{value}"\n', f"\nassert {name} ==", f' "{value}"') for name, value in pairs.items()]
    return _hide(tokenizer, text, facts, length, generator)


def _hide(
    tokenizer: PreTrainedTokenizerBase,
    text: list[int],
    told: list[tuple[str, str, str]],
    length: int,
    generator: random.Random,
) -> WeightedWindow:
    """Statements at random places in the text, then for each its question and answer, in another order."""
    facts = [[_encode(tokenizer, part) for part in fact] for fact in told]
    while facts and sum(len(part) for fact in facts for part in fact) > 3 * length // 4:
        facts.pop()
    statements = [statement for statement, _, _ in facts]
    asked = generator.sample(facts, len(facts))
    quiz = [token for _, question, answer in asked for token in (*question, *answer)]
    stressed = [flag for _, question, answer in asked for flag in (*[False] * len(question), *[True] * len(answer))]
    room = length - len(quiz) - sum(map(len, statements))
    cuts = sorted(generator.randrange(room + 1) for _ in statements)
    ids: list[int] = []
    for begin, end, fact in zip([0, *cuts], [*cuts, room], [*statements, []], strict=True):
        ids += text[begin:end] + fact
    return WeightedWindow.stressing(ids + quiz, [False] * len(ids) + stressed)


def _encode(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    return tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
