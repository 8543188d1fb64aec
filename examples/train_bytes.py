# SPDX-License-Identifier: Apache-2.0
"""Train a small byte-level language model with NumPy and combiner alone: the command `combiner demo`, as a script.

combiner/cli/demo.py has the model, its gradients and the training; the other examples use its text.

    python examples/train_bytes.py                  # about a minute
    python examples/train_bytes.py --length 4096    # longer context; dense attention falls behind further
"""

import os

os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")  # NumPy reads it at import; each model has its own thread

from combiner.cli.demo import BYTES, RECENT, count_models, main, read_text, windows

__all__ = ["BYTES", "RECENT", "count_models", "read_text", "windows"]

if __name__ == "__main__":
    main()
