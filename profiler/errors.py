"""The form that every error of both packages has: what was got, what was expected, where, and the remedy."""


class DescribedError(Exception):
    """Base class of every error raised for a mistake of the user or a failed run.

    Args:
        got: what was found, in one clause.
        expected: what would have been right (optional).
        where: the FQN of the module, the file and line, the field, or the rank and stage (optional).
        remedy: what to change.
    """

    def __init__(self, got: str, *, expected: str = "", where: str = "", remedy: str = "") -> None:
        self.got, self.expected, self.where, self.remedy = got, expected, where, remedy
        parts = [got]
        if expected:
            parts.append(f"expected {expected}")
        if where:
            parts.append(f"at {where}")
        if remedy:
            parts.append(f"remedy: {remedy}")
        super().__init__("; ".join(parts))

    def __reduce__(self) -> tuple[object, ...]:
        """Errors travel between ranks: they are rebuilt from their parts."""
        return _rebuild, (type(self), self.got, self.expected, self.where, self.remedy)


def _rebuild(cls: type[DescribedError], got: str, expected: str, where: str, remedy: str) -> DescribedError:
    return cls(got, expected=expected, where=where, remedy=remedy)


class ProfileError(DescribedError, ValueError):
    """A profile could not be measured, or a profile file is not valid."""
