"""The errors that a user can meet, each with the exit status of the process that ends on it.

A message says what is wrong, in which file, what was expected, what was found and what to do. Anything that is raised and
is not a ``DinoRegError`` is a defect of the program and exits with status 1.
"""

from __future__ import annotations


class DinoRegError(Exception):
    """Base of all errors that a user can meet."""

    exit_code = 1


class ConfigError(DinoRegError):
    """An option, preset or configuration value that does not exist or is out of range."""

    exit_code = 2


class InputError(DinoRegError):
    """An input file or folder that is missing, unreadable, malformed or unfit for registration.

    Attributes:
        code: what kind of problem it is, a key of ``dinoreg.validate.CODES``.
    """

    exit_code = 3

    def __init__(self, message: str, code: str = "unreadable") -> None:
        super().__init__(message)
        self.code = code


class WeightsError(DinoRegError):
    """Encoder weights that are missing, of the wrong architecture or of the wrong content."""

    exit_code = 4


class OutputError(DinoRegError):
    """A result that could not be written."""

    exit_code = 5


class RegistrationError(DinoRegError):
    """A registration that could not be carried out, numerically or for lack of memory."""

    exit_code = 6
