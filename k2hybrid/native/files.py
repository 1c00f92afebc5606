"""Maps of files that may shrink or fail while they are read; see `csrc/cpu/fault.h`."""

from __future__ import annotations

from k2hybrid.errors import NativeError
from k2hybrid.native.extension import ERRORS, EXTENSION


class FileMap:
    """A map of a file whose loss does not end the process: who reads what is gone reads zeros.

    See `csrc/cpu/fault.h`. Close it before the memory is unmapped.

    Args:
        address: of the map, which is read-only and begins with the file.
        nbytes: of the map.
        descriptor: of the file; duplicated.

    Raises:
        NativeError: it overlaps a map that is registered, or there are too many maps or descriptors.
    """

    def __init__(self, address: int, nbytes: int, descriptor: int) -> None:
        self.address = address
        self.nbytes = nbytes
        with ERRORS:
            self._id: int | None = EXTENSION.register_file(address, nbytes, descriptor)

    @property
    def failed(self) -> bool:
        """Whether any of it may have been read as zeros."""
        return file_failed(self.address, self.nbytes)

    def restore(self, descriptor: int) -> bool:
        """Map the file again, opened anew, in the same place, while nobody reads.

        Returns:
            False: the file is not as long as the map, and nothing was changed.

        Raises:
            NativeError: it cannot be mapped, or this map is closed.
        """
        if self._id is None:
            raise NativeError("this map of a file is closed")
        with ERRORS:
            return bool(EXTENSION.restore_file(self._id, descriptor))

    def close(self) -> None:
        """Watch it no longer. Repeatedly."""
        if self._id is not None:
            closed, self._id = self._id, None
            EXTENSION.unregister_file(closed)


def look_at_files() -> float:
    """Notice which mapped files became shorter: the rest of their last page is read without a signal.

    Returns:
        The seconds it took.
    """
    return float(EXTENSION.look_at_files())


def file_failed(address: int, nbytes: int) -> bool:
    """Whether a byte there may have been read as zero in place of what its file holds. Ask after reading."""
    return bool(EXTENSION.file_failed(address, nbytes))


def file_changes() -> int:
    """Another number whenever `failed_ranges` or `rewritten_files` give something else."""
    return int(EXTENSION.file_changes())


def failed_ranges() -> list[tuple[int, int]]:
    """All bytes for which `file_failed` is true, as addresses [begin, end)."""
    return [(int(begin), int(end)) for begin, end in EXTENSION.failed_ranges()]


def rewritten_files() -> dict[int, int]:
    """Addresses of maps whose files `look_at_files` found written to, at the same size → how often."""
    return {int(address): int(times) for address, times in EXTENSION.rewritten_files().items()}
