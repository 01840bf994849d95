"""What a library's error says, as one line of ours."""

from __future__ import annotations

__all__ = ["reason"]

_UNSAFE = ("weights_only", "weights only", "allow_pickle", "safe_globals", "unpickl", "torch.load")
_FOREIGN_CODE = ("trust_remote_code", "custom code")
_LONGEST = 400
_WITHOUT_A_SENTENCE = (AttributeError, IndexError, KeyError)


def reason(error: BaseException) -> str:
    """What ``error`` says, in a line.  Advice to read files in an unsafe way is never passed on."""
    if isinstance(error, RecursionError):
        return "it is nested too deeply"
    if type(error).__name__ == "OfflineModeIsEnabled":  # of huggingface_hub
        return "the Hub is not asked (offline mode), and its cache does not hold it"
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    if not lines:
        return type(error).__name__
    whole = " ".join(lines).lower()
    if any(words in whole for words in _FOREIGN_CODE):
        return "it needs code of its own, and saekit runs no code that comes with a model or a dataset"
    if any(words in whole for words in _UNSAFE):
        return "the file is damaged, or holds other things than tensors, which saekit does not read"
    first = " ".join(lines[:2]) if lines[0].endswith(":") else lines[0]
    first = first if len(first) <= _LONGEST else f"{first[:_LONGEST]}..."
    return f"{type(error).__name__}: {first}" if isinstance(error, _WITHOUT_A_SENTENCE) else first
