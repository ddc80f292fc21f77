"""Byte-pair vocabularies learnt from text.

They stand in for fairseq's Moses tokenisation with joint byte pairs, which needs Perl scripts.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from common.config import CommonConfig

SPECIAL = ["<s>", "<pad>", "</s>", "<unk>"]  # ids 0 to 3, fairseq's order
SUFFIX = "</w>"  # marks the end of a word


def learn(texts: Iterable[str], size: int, folder: Path) -> int:
    """Learn a byte-pair tokenizer and save it.

    Args:
        texts: sentences.
        size: tokens, the four special ones included (fewer where the text does not have so many).
        folder: where it is saved.

    Returns:
        Number of tokens.
    """
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE(unk_token=SPECIAL[3], end_of_word_suffix=SUFFIX))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()  # words and runs of punctuation
    tokenizer.decoder = decoders.BPEDecoder(suffix=SUFFIX)
    trainer = trainers.BpeTrainer(
        vocab_size=size, special_tokens=SPECIAL, end_of_word_suffix=SUFFIX, show_progress=False
    )
    tokenizer.train_from_iterator(texts, trainer)
    names = dict(zip(("bos_token", "pad_token", "eos_token", "unk_token"), SPECIAL, strict=True))
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, **names).save_pretrained(str(folder))
    return tokenizer.get_vocab_size()


def command(paper: str, schema: type[CommonConfig], usage: str, arguments: list[str]) -> int:
    """`<folder> [key=value ...]`: learn both vocabularies of a paper's translation experiment from its training text.

    Args:
        paper: whose `data=iwslt14 model=transformer_iwslt task=translation` says which text and how many tokens.
        schema: of its trials.
        usage: printed where the arguments are no folder and overrides.
        arguments: of the command line.

    Returns:
        The exit code.
    """
    from common import errors
    from common.compose import Composer
    from common.data import load
    from common.data.pairs import READ, languages

    if not arguments or arguments[0].startswith("-") or "=" in arguments[0]:
        print(usage)
        return 2
    folder, overrides = Path(arguments[0]), arguments[1:]
    try:
        config: Any = Composer(paper, schema).config(
            ["data=iwslt14", "model=transformer_iwslt", "task=translation", *overrides]
        )
        train, column = load(config.data)["train"], config.data.inputs
        sizes = config.model.source_vocab, config.model.vocab
        for language, size in zip(languages(train, column), sizes, strict=True):
            rows = range(0, len(train), READ)
            texts = (pair[language] for start in rows for pair in train[start : start + READ][column])
            print(f"{folder / language}: {learn(texts, size, folder / language)} tokens")
    except Exception as error:
        return errors.report(error, schema)
    return 0
