"""What stops a job."""


class JobError(RuntimeError):
    """A job cannot go on; one sentence for the user, who can run the same command again."""


class LockedError(JobError):
    """Another process writes to the folder."""


class ManifestError(JobError):
    """The folder belongs to a job of another kind or with other settings."""
