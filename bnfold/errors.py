"""Everything that bnfold raises on purpose.

    BnfoldError                  status  the text says what, where, and what to do
    ├── UsageError                  2    an option or argument that makes no sense
    ├── InputError                  3    a model or data file that can't be read, or is unsafe or invalid
    │   ├── ModelError              3    ... a model
    │   └── DataError               3    ... the user's data
    ├── UnsupportedError            4    a valid request that bnfold doesn't serve
    │   └── NothingToDoError        4    no BatchNorm in the model
    ├── DeviceError                 5    a device or execution provider that isn't there, or isn't used
    │   └── OutOfMemoryError        5    ... or has too little memory
    └── CheckError                  1    a result that failed its own check, so nothing was written

Any other exception that leaves bnfold is a defect of bnfold (status 70). Refusals of the algebra
are not errors: they are reasons in a report (see `affine.Blocked`).
"""

from __future__ import annotations

NO_BATCHNORM = "the model holds no BatchNorm: there is nothing to do"
HOW_TO_KEEP = (
    "Exporters fold Conv+BatchNorm by default; torch.onnx.export keeps them with "
    "dynamo=True, optimize=False, or with dynamo=False, training=torch.onnx.TrainingMode.PRESERVE, do_constant_folding=False"
)
EXAMPLE = "such as --input-shape 1,3,224,224"  # on the command line
OTHER_NETWORK = "model {} is of another network than the first"  # of several that are averaged
ALREADY_FOLDED = f"{NO_BATCHNORM}. {HOW_TO_KEEP}"


class BnfoldError(Exception):
    """Base of all errors raised on purpose; `exit_status` is what the command line exits with."""

    exit_status = 70


class UsageError(BnfoldError):
    """An option or argument that makes no sense."""

    exit_status = 2


class InputError(BnfoldError):
    """A file or object that can't be read, or is unsafe or invalid."""

    exit_status = 3


class ModelError(InputError):
    """A model that can't be read, or is unsafe or invalid."""


class DataError(InputError):
    """Data that can't be read or that don't fit the model."""


class UnsupportedError(BnfoldError):
    """A valid request that bnfold doesn't serve."""

    exit_status = 4


class NothingToDoError(UnsupportedError):
    """The model holds no BatchNorm."""


class DeviceError(BnfoldError):
    """A device or execution provider that isn't available, or isn't honoured."""

    exit_status = 5


class OutOfMemoryError(DeviceError):
    """Too little memory on a device. samples: how many were run at a time, 0 where that isn't known."""

    samples = 0


class CheckError(BnfoldError):
    """A result that failed its own check; nothing was written."""

    exit_status = 1
