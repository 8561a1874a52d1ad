"""What an evaluation's records must hold in the corner cases."""
import pytest
import torch

from medmcqa_lora.data.questions import Question
from medmcqa_lora.evaluation.records import EvaluationOutput, run_batches


def test_a_batch_that_does_not_fit_says_what_to_lower(tmp_path):
    questions = [Question(str(k), f"{k}?", ("a", "b", "c", "d"), 0) for k in range(10)]
    rows = [[1, 2]] * 10

    def begin(batch):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 1.50 GiB.")

    output = EvaluationOutput(tmp_path, quiet=True)
    message = "scoring 8 questions at once; lower per_device_eval_batch_size"
    with pytest.raises(ValueError, match=message):
        run_batches(questions, rows, [[*range(8)], [8, 9]], output, "large", begin)
