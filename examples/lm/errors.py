"""The one error of a job that is the user's to mend."""

from __future__ import annotations


class JobError(ValueError):
    """An argument, a text or a checkpoint does not fit: which, what it was, what was wanted.

    Args:
        argument: the option or the field, such as ``"--text"``.
        was: what it was.
        wanted: what would have been right.
    """

    def __init__(self, argument: str, was: object, wanted: object) -> None:
        super().__init__(f"{argument} is {was}, expected {wanted}")
