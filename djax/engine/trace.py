"""What happened in a decode, forward by forward: enough to replay it, draw it and learn from it."""

import dataclasses
from typing import Any, Generic, NamedTuple, TypeVar

import jax
import jax.numpy as jnp
import numpy as np


@dataclasses.dataclass(frozen=True, eq=False)
class Trace:
    """The record of one row. L is its canvas, prompt included, F its forwards, S the block length.

    accepted_at: int32 `[L]`, the forward (from 0) that accepted the position's token: the last one that wrote there, if the
                 decoder edits; -1 for the prompt and for what an early stop filled with EOS.
    confidence:  float32 `[L]`, the token's probability under that forward's logits, before any credit; 0 where none.
    proposals:   int32 `[F, S]`, the token each position of the block proposed at each forward, accepted or not.
    starts:      int32 `[F]`, where the block of each forward starts; positions from the canvas' end on mean nothing.
    whole:       bool `[F]`, whether the forward ran the whole canvas rather than a window.
    """

    accepted_at: np.ndarray
    confidence: np.ndarray
    proposals: np.ndarray
    starts: np.ndarray
    whole: np.ndarray

    def canvas(self, canvas: np.ndarray, prompt: int, forward: int, mask_id: int) -> np.ndarray:
        """The canvas `[L]` right after a forward, from the finished one and the length of the prompt.

        A position that was edited shows the mask up to the forward that wrote what the finished canvas has there.
        """
        shown = (self.accepted_at >= 0) & (self.accepted_at <= forward)
        shown[:prompt] = True
        return np.where(shown, canvas, mask_id)


# An array, on a device or on the host.
A = TypeVar("A", bound=jax.Array | np.ndarray)


class Record(NamedTuple, Generic[A]):
    """A trace being written, in the loop's carry: the fields of `Trace` with a batch axis, F wide enough for any decode."""

    accepted_at: A
    confidence: A
    proposals: A
    starts: A
    whole: A

    @classmethod
    def start(cls, batch: int, length: int, block: int, post_steps: int) -> "Record[jax.Array]":
        # A turn runs two forwards at most, and accepts a token or is one of a block's post-steps.
        most = 2 * (length + -(-length // block) * post_steps)
        return Record(
            jnp.full((batch, length), -1, jnp.int32),
            jnp.zeros((batch, length), jnp.float32),
            jnp.zeros((batch, most, block), jnp.int32),
            jnp.zeros((batch, most), jnp.int32),
            jnp.zeros((batch, most), bool),
        )

    def add(
        self: "Record[Any]",
        forward: jax.Array,
        start: jax.Array,
        tokens: jax.Array,
        written: jax.Array,
        confidence: jax.Array,
        running: jax.Array,
        whole: bool,
    ) -> "Record[jax.Array]":
        """Record forward number `forward` `[B]` of the running rows: the block's start `[B]` and tokens `[B, S]`; which
        canvas positions it wrote `[B, L]`, and the confidence of each canvas position's token `[B, L]`."""
        # Rows that do not run write outside, where writing does nothing.
        at = jnp.arange(len(forward)), jnp.where(running, forward, self.starts.shape[1])
        return Record(
            jnp.where(written, forward[:, None], self.accepted_at),
            jnp.where(written, confidence, self.confidence),
            self.proposals.at[at].set(tokens, mode="drop"),
            self.starts.at[at].set(start, mode="drop"),
            self.whole.at[at].set(whole, mode="drop"),
        )

    def row(self, b: int, length: int, forwards: int) -> Trace:
        """The trace of row b (on the host): its canvas' positions and its forwards."""
        return Trace(
            np.asarray(self.accepted_at[b, :length]),
            np.asarray(self.confidence[b, :length]),
            np.asarray(self.proposals[b, :forwards]),
            np.asarray(self.starts[b, :forwards]),
            np.asarray(self.whole[b, :forwards]),
        )
