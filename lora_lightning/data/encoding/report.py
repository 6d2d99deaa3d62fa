"""Counts of what became of the samples of a split."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass
class EncodingReport:
    """Counts of examples and tokens.

    Attributes:
        examples: Examples made.
        tokens: Their tokens; of an encoder-decoder, those of the target too.
        learned: Those of them that are learned.
        truncated: Examples that were cut.
        split_documents: Documents that became several examples, because they are too long.
        too_long: Examples dropped because they are too long.
        untrainable: Examples dropped because nothing of them is learned.
        split_chats: Chats that became several examples.
        unended_chats: Chats whose end no special token marks.
    """

    examples: int = 0
    tokens: int = 0
    learned: int = 0
    truncated: int = 0
    split_documents: int = 0
    too_long: int = 0
    untrainable: int = 0
    split_chats: int = 0
    unended_chats: int = 0

    def line(self, split: str, limit: str) -> str:
        """One line for the console.

        Args:
            split: Name of the split.
            limit: The encoder's `limit`.
        """
        share = 100 * self.learned / max(self.tokens, 1)
        parts = [
            f"{split}: {self.examples:,} examples, {self.tokens:,} tokens, {share:.0f} % of them "
            "learned"
        ]
        if self.truncated:
            parts.append(f"{self.truncated:,} cut to {limit} (data.max_length)")
        if self.split_documents:
            parts.append(
                f"{self.split_documents:,} documents, longer than {limit}, go on in further "
                "examples (data.too_long)"
            )
        if self.too_long:
            parts.append(f"{self.too_long:,} dropped, longer than {limit} (data.too_long)")
        if self.untrainable:
            parts.append(
                f"{self.untrainable:,} dropped, nothing of them would be learned (data.untrainable)"
            )
        if self.split_chats:
            parts.append(
                f"{self.split_chats:,} chats became several examples, because the chat template "
                "rewrites earlier turns"
            )
        if self.unended_chats:
            parts.append(
                f"{self.unended_chats:,} chats end in no special token, so the model does not "
                "learn to stop (data.chat_template)"
            )
        return "; ".join(parts)
