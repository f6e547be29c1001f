"""To be imported before transformers, which draws its progress bars with tqdm.auto.

That complains, once and on import, where a notebook has no widgets.
"""

import warnings

from tqdm import TqdmWarning

with warnings.catch_warnings():
    warnings.simplefilter("ignore", TqdmWarning)
    import tqdm.auto  # noqa: F401
