"""The two ways a run ends on purpose: a mistake of the user's, and a stop with an exit code of its own."""


class ConfigError(ValueError):
    """A mistake in the configuration or its paths. The run ends with 2 and this message as its first line."""

    exit_code = 2


class RunError(RuntimeError):
    """A stop whose exit code says why.

    3 no valid checkpoint where one was demanded, 75 preempted (requeue), 76 non-finite loss, 77 hang, 78 ranks
    diverged.
    """

    def __init__(self, message: str, exit_code: int) -> None:
        super().__init__(message)
        self.exit_code = exit_code
