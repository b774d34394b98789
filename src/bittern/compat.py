"""The versions of transformers that Bittern works with, and the names of theirs that another version may lack."""

import warnings
from importlib.metadata import version

OLDEST, NEWEST = (5, 22), (5, 24)  # minor versions that the tests passed with


def check_version(found: str) -> None:
    """Warn of a minor version that nobody tested. Raises ImportError for one that is too old."""
    minor = tuple(int(part) for part in found.split(".")[:2])
    tested = f"Bittern works with {'.'.join(map(str, OLDEST))} to {'.'.join(map(str, NEWEST))}"
    if minor < OLDEST:
        raise ImportError(f"transformers {found} is too old; {tested}: pip install -U transformers")
    if minor > NEWEST:
        warnings.warn(f"transformers {found} is newer than what was tested; {tested}", stacklevel=2)


INSTALLED = version("transformers")
check_version(INSTALLED)
try:
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import (
        PrefixChange,
        WeightConverter,
        WeightRenaming,
        WeightTransform,
        rename_source_key,
        revert_weight_conversion,
    )
    from transformers.masking_utils import eager_mask
    from transformers.modeling_utils import remove_tied_weights_from_state_dict
    from transformers.utils.output_capturing import _active_collector as active_collector
except ImportError as error:
    raise ImportError(
        f"transformers {INSTALLED} lacks what Bittern uses ({error}); "
        f"pip install 'transformers>={OLDEST[0]}.{OLDEST[1]},<{NEWEST[0]}.{NEWEST[1] + 1}'"
    ) from error

__all__ = ["PrefixChange", "WeightConverter", "WeightRenaming", "WeightTransform"]
__all__ += ["active_collector", "eager_mask", "get_model_conversion_mapping", "remove_tied_weights_from_state_dict"]
__all__ += ["rename_source_key", "revert_weight_conversion"]
