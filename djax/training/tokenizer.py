"""The small model's tokenizer: byte-level BPE, every digit its own token, LLaDA-MoE's role format as chat template."""

import random
from pathlib import Path

from djax.tasks import problems
from djax.text.contract import Tokenizer

EOS, MASK = "<|endoftext|>", "<|mask|>"
SPECIAL = [EOS, MASK, "<role>", "</role>", "<|role_end|>"]
CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{% set role = {'system': 'SYSTEM', 'user': 'HUMAN', 'assistant': 'ASSISTANT'}[message['role']] %}"
    "<role>{{ role }}</role>{{ message['content'] }}<|role_end|>"
    "{% endfor %}"
    "{% if add_generation_prompt %}<role>ASSISTANT</role>{% endif %}"
)


def is_whole(words: Tokenizer) -> bool:
    """Whether a loaded tokenizer is one that `train` wrote, with what stands in its other files."""
    return (words.eos_token, words.mask_token, words.chat_template) == (EOS, MASK, CHAT_TEMPLATE)


def train(directory: Path, vocab: int, seed: int = 0, examples: int = 20_000) -> None:
    """Train on `examples` generated problems and write tokenizer.json and tokenizer_config.json into `directory`.

    The byte alphabet is always in, so any text has tokens. A digit never merges with a neighbour: numbers the model
    never saw are spelled like those it did.
    """
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    rng = random.Random(f"tokenizer {seed}")
    drawn = [problems.draw(rng, held_out=False) for _ in range(examples)]
    drawn += [problems.drill(rng, 3) for _ in range(examples // 10)]
    corpus = [text for p in drawn for text in (p.question, p.answer)]
    corpus += ["HUMAN", "ASSISTANT", "SYSTEM"] * examples
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=vocab, special_tokens=SPECIAL, initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator(corpus, trainer)
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token=EOS, pad_token=EOS, mask_token=MASK, clean_up_tokenization_spaces=False
    )
    fast.chat_template = CHAT_TEMPLATE
    fast.save_pretrained(str(directory))
