"""The errors people meet. Every message is one line: what is wrong, expected against actual, what to do next.

The command line turns a `CrabError` into that line and the class's exit code; nothing else is caught there.
"""


class CrabError(Exception):
    """Base of all errors raised on purpose. Exit code 1: our fault."""

    exit_code = 1


class InputError(CrabError):
    """The user's input can't be used as it is. Exit code 2."""

    exit_code = 2


class MediaError(InputError):
    """A media file is missing, unreadable, truncated or empty."""


class TaskError(InputError):
    """An unknown task, or one that doesn't apply to the media given."""


class BundleError(InputError):
    """A bundle is damaged, incomplete, or of a version that this runtime can't open."""


class ModelError(InputError):
    """A model or adapter directory is not what its configuration says."""


class DependencyError(InputError):
    """An optional package that this command needs isn't installed."""


class EngineError(CrabError):
    """An engine can't run on this machine or returned what it must not."""


class DeviceError(EngineError):
    """The machine lacks what was asked for: a GPU, memory on it, a newer driver. Exit code 2."""

    exit_code = 2


class CheckError(CrabError):
    """A check ran and its result is below the threshold. Exit code 3."""

    exit_code = 3
