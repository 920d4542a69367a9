"""What can go wrong, as one tree. Every message names the value, the rule and the way out."""


class CamriTuneError(Exception):
    """Base of all errors raised on purpose. The command prints the message alone and exits with `exit_code`."""

    exit_code = 1


class InputError(CamriTuneError):
    """The user can mend it: an option, a study file, a data folder, a bundle. Exit code 2."""

    exit_code = 2


class DataError(InputError):
    """A data set that is missing, unreadable, or cannot be split as asked."""


class FileNotReadError(DataError):
    """A file whose bytes could not be had: of a drive that went away, or of somebody else. It need not be corrupt."""


class StudyMismatchError(InputError):
    """A stored study is being resumed with a configuration that would make its trials incomparable."""


class BundleError(InputError):
    """An exported model that is incomplete, altered, or not one of ours."""


class TrainingDivergedError(CamriTuneError):
    """The loss stopped being finite. The trial fails with this reason; it is never counted as pruned."""


class OutOfMemoryError(CamriTuneError):
    """A training does not fit into memory, not even with half the batch at a time. Its settings are not to blame."""


class WorkerError(CamriTuneError):
    """The worker processes cannot do the study's work (they keep failing)."""


class StorageError(CamriTuneError):
    """The study's database does not answer, or cannot be written to. What is in it stays; the same command resumes."""


class StoppedError(CamriTuneError):
    """A worker was asked to end, for `reason`. Its training has been given back, saved as of its last epoch."""

    exit_code = 130

    def __init__(self, reason: str) -> None:
        super().__init__(f"stopped ({reason}); a training at hand was saved and given back")
        self.reason = reason
