"""Problems as training batches: the chat-formatted question, then the answer, then EOS to the end of the canvas."""

import random

import numpy as np

from djax.errors import OptionError
from djax.tasks import problems
from djax.text.contract import Tokenizer


def example(tokenizer: Tokenizer, problem: problems.Problem) -> tuple[list[int], list[int]]:
    """Prompt ids, exactly as `djax.generate` would make them, and answer ids without EOS."""
    chat = [{"role": "user", "content": problem.question}]
    prompt = tokenizer.apply_chat_template(chat, add_generation_prompt=True, tokenize=True)["input_ids"]
    return prompt, tokenizer(problem.answer)["input_ids"]


def batch(
    tokenizer: Tokenizer, rng: random.Random, rows: int, length: int, drills: float, easy: float, eos_id: int
) -> tuple[np.ndarray, np.ndarray]:
    """tokens int32 and response bool, both `[rows, length]`, from freshly drawn training problems.

    drills is the share of rows that are lists of sums, as long as the canvas allows, and easy the share of sums on single
    digits in them. The response runs to the end of the
    canvas, EOS included, so that answers learn to end. Problems that do not fit with at least one EOS are passed over: a
    short canvas means short problems.
    """
    tokens = np.full((rows, length), eos_id, np.int32)
    response = np.zeros((rows, length), bool)
    b = tries = 0
    while b < rows:
        tries += 1
        if tries > 1000 * rows:
            raise OptionError(f"length: hardly any problem fits a canvas of {length} tokens; 96 hold the shortest stories")
        if rng.random() < drills:
            problem = problems.drill(rng, rng.randint(2, length // 18), easy)
        else:
            problem = problems.draw(rng, held_out=False)
        prompt, answer = example(tokenizer, problem)
        if len(prompt) + len(answer) < length:
            tokens[b, : len(prompt) + len(answer)] = prompt + answer
            response[b, len(prompt) :] = True
            b += 1
    return tokens, response
