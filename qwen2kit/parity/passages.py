"""Held-out text on which the loss by quantising is measured: our own prose, Chinese and code, or
a user's file, cut into windows of token ids."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from qwen2kit.errors import ConfigError
from qwen2kit.parity.prompts import Prompt

if TYPE_CHECKING:
    from qwen2kit.tokenizer.bpe import Tokenizer

AUTO = "auto"
WINDOW_TOKENS = 512
FILE_TOKENS = 2048
_CHARACTERS_PER_TOKEN = 16  # more than any text has; bounds what is read of a large file

_STORY = """\
Ingrid had kept the ferry for eleven years before anyone asked her to take it across at night. The \
man who asked was a piano tuner, with a leather case under his arm and mud to the knees, and he \
said that the widow at Holm had promised him supper and the price of his train. "There is ice at \
the edges," she told him, "and the lamp on the far side has been out since Sunday." He looked at \
the water for some time. Then he opened the case, took out a tuning fork, and struck it against \
the rail. They listened until the note had gone. "If the ice were closer than the middle," he \
said, "we would have heard it answer." She did not believe a word of it, but nobody had ever given \
her a reason to cross that sounded so much like a reason, and so she untied the boat.

Halfway over he began to talk about the widow's piano. It had been built for a ship, he said, and \
the legs were made to be bolted down, which was why it never stood quite level on a floor."""

_ESSAY = """\
A heat pump does not make heat; it moves it. A fluid that boils far below freezing is allowed to \
evaporate in a coil outside the house, and because evaporation takes energy, the coil becomes \
colder than the winter air around it. Heat therefore flows into the fluid even on a frosty day. A \
compressor then squeezes the vapour, which raises its temperature above that of the rooms, and in \
a second coil it condenses and gives the heat away. For each unit of electricity the compressor \
uses, two to four units of heat arrive indoors. The ratio falls as the difference in temperature \
grows, so large radiators or heated floors, which can be run lukewarm, make the same machine \
cheaper to run. The common objection, that such a device must fail when it is needed most, \
mistakes a falling efficiency for none at all: at fifteen degrees of frost a good one \
still delivers about twice what it consumes."""

_CHINESE = """\
老陈的修表铺开在巷子的尽头，门口挂着一只停在三点一刻的大钟。街坊们常常问他，既然什么表都能修好，\
为什么不先把自己的钟修一修。老陈总是笑着说，那只钟每天有两次是准的，比许多人强得多。其实大家都知道，\
钟停下的那一刻，正是他的女儿坐上火车去北方念书的时候。后来女儿毕业了，写信说要回来看看。那天清早，\
老陈搬来梯子，擦净了玻璃，上紧了发条。傍晚时分，巷子里的人第一次听见那只钟敲了六下。"""

_CODE = '''\
from collections import deque


def shortest_path(grid: list[str], start: tuple[int, int], goal: tuple[int, int]) -> int | None:
    """Fewest steps between two cells of a maze, or None if no path exists.

    Walls are marked with "#"; a step goes up, down, left or right.
    """
    rows, columns = len(grid), len(grid[0])
    queue = deque([(start, 0)])
    seen = {start}
    while queue:
        (row, column), steps = queue.popleft()
        if (row, column) == goal:
            return steps
        for dr, dc in ((1, 0), (-1, 0), (0, 1), (0, -1)):
            cell = (row + dr, column + dc)
            inside = 0 <= cell[0] < rows and 0 <= cell[1] < columns
            if inside and cell not in seen and grid[cell[0]][cell[1]] != "#":
                seen.add(cell)
                queue.append((cell, steps + 1))
    return None
'''
_PASSAGES = {"story": _STORY, "essay": _ESSAY, "chinese": _CHINESE, "code": _CODE}


def held_out(tokenizer: Tokenizer, text: str = AUTO, *, context: int) -> list[Prompt]:
    """Windows of at most `WINDOW_TOKENS` tokens, each with at least two.

    Args:
        tokenizer: the model's.
        text: ``auto`` for the built-in passages, or the path of a UTF-8 file, of which the first
            `FILE_TOKENS` tokens are used.
        context: the most tokens that the model takes at once.

    Raises:
        ConfigError: the file cannot be read, is not UTF-8, or holds fewer than two tokens.
    """
    if text == AUTO:
        texts = {name: tokenizer.encode(passage) for name, passage in _PASSAGES.items()}
    else:
        texts = {"text": tokenizer.encode(_read(Path(text)))[:FILE_TOKENS]}
    window = min(WINDOW_TOKENS, context)
    windows = [
        Prompt(f"{name}-{start}", tuple(tokens[start : start + window]))
        for name, tokens in texts.items()
        for start in range(0, len(tokens), window)
    ]
    long_enough = [prompt for prompt in windows if len(prompt.tokens) > 1]
    if not long_enough:
        raise ConfigError(f"{text}: holds no two tokens; give a text of at least a few sentences")
    return long_enough


def _read(path: Path) -> str:
    try:
        with path.open(encoding="utf-8") as file:
            return file.read(FILE_TOKENS * _CHARACTERS_PER_TOKEN)
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read ({error.strerror}); give a text file") from error
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path}: is not UTF-8 text; convert it first") from error
