"""Tasks that lm-eval lacks, on a few invented rows with the columns of the Hub's data sets."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jinja2
import lm_eval.tasks
import pytest
from lm_eval.tasks._yaml_loader import load_yaml

from qwen2kit.errors import DataError
from qwen2kit_evals.suites import OWN_TASKS
from qwen2kit_evals.suites.tasks.exams import m3exam_labels
from qwen2kit_evals.suites.tasks.theoremqa import is_right
from qwen2kit_evals.tasks import TaskSelection, select_tasks

M3EXAM = [
    {
        "question_text": f"Which event occurred first? ({i})",
        "background_description": ["Read this."] if i == 1 else [],
        "answer_text": "2",
        "options": ["(1) battle of Gettysburg", "(2) firing on Fort Sumter"],
        "need_image": "yes" if i == 2 else "no",
        "language": "english",
        "level": "mid",
        "subject": "social",
        "subject_category": "social-science",
        "year": "2006",
    }
    for i in range(3)
]
INDOMMLU = [
    {
        "subject": "Sejarah",
        "group": "IPS",
        "level": "SD",
        "question": f"Ibu kota Indonesia adalah? {i}",
        "options": "A. Jakarta\nB. Medan\nC. Bali",
        "answer": "A",
        "is_for_fewshot": int(i < 3),
    }
    for i in range(5)
]
RUMMLU = [
    {
        "instruction": "unused",
        "inputs": {
            "text": f"Сколько будет {i} + 1?",
            "option_a": "1",
            "option_b": "2",
            "option_c": "3",
            "option_d": "4",
            "subject": "math",
        },
        "outputs": "ABCD"[i % 4],
        "meta": {"domain": "math", "id": i},
    }
    for i in range(7)
]
THEOREMQA = [
    {
        "Question": f"What is {i} + 1?",
        "Answer": str(i + 1),
        "Answer_type": "integer",
        "Picture": None,
    }
    for i in range(7)
]
LANGUAGES = ("eng", "zho_simpl", "fra", "deu", "spa", "rus", "jpn", "ara", "tha")
FLORES = [{f"sentence_{code}": f"{code} sentence {i}" for code in LANGUAGES} for i in range(7)]


def put(root: Path, name: str, files: dict[str, Sequence[dict[str, Any]]]) -> None:
    """Write a data set; keys are ``config/split``."""
    configs: dict[str, list[str]] = {}
    for place, rows in files.items():
        config, split = place.split("/")
        file = root / name / f"{place}.jsonl"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text("\n".join(json.dumps(row) for row in rows))
        entry = f"  - split: {split}\n    path: {place}.jsonl"
        configs.setdefault(config, []).append(entry)
    card = [
        f"- config_name: {config}\n  data_files:\n" + "\n".join(e) for config, e in configs.items()
    ]
    (root / name / "README.md").write_text("---\nconfigs:\n" + "\n".join(card) + "\n---\n")


def choose(root: Path, task: str, shots: int) -> TaskSelection:
    return select_tasks([task], datasets=root, num_fewshot=shots, defaults=False)


def requests(task: Any, shots: int) -> list[Any]:
    task.set_config(key="num_fewshot", value=shots)
    task.build_all_requests(limit=None, rank=0, world_size=1)
    return [instance.args for instance in task.instances]


def test_theoremqa(tmp_path: Path) -> None:
    put(tmp_path, "TIGER-Lab/TheoremQA", {"default/test": THEOREMQA})
    (task,) = choose(tmp_path, "qwen2_theoremqa", 2).objects
    prompt, how = requests(task, 2)[-1]
    assert prompt == (
        "Question: What is 0 + 1?\nAnswer: The answer is 1.\n\n"
        "Question: What is 1 + 1?\nAnswer: The answer is 2.\n\n"
        "Question: What is 6 + 1?\nAnswer:"
    )
    assert how["until"][0] == "Question:"
    assert task.process_results(THEOREMQA[0], ["The answer is 1."]) == {"accuracy": 1.0}


@pytest.mark.parametrize(
    ("text", "answer", "kind", "right"),
    [
        ("The answer is 3.14.", "3.14159", "float", True),
        ("The answer is 3.2", "3.14159", "float", False),
        ("The answer is 1/2", "0.5", "float", True),
        ("answer is 1,234", "1234", "integer", True),
        ("2 then 3. The answer is 4", "4", "integer", True),
        ("The answer is [1, 2, 3]", "[1, 2, 3]", "list of integer", True),
        ("The answer is [1, 2]", "[1, 2, 3]", "list of integer", False),
        ("The answer is yes, because", "True", "bool", True),
        ("The answer is False", "True", "bool", False),
        ("the answer is (b)", "(b)", "option", True),
        ("The answer is c.", "(b)", "option", False),
        ("", "7", "integer", False),
        ("The answer is 1/0", "7", "float", False),
    ],
)
def test_theoremqa_grading(text: str, answer: str, kind: str, right: bool) -> None:
    assert is_right(text, answer, kind) is right


def test_m3exam(tmp_path: Path) -> None:
    languages = load_yaml(OWN_TASKS / "qwen2_m3exam.yaml")["task"]
    assert len(languages) == 9
    files = {f"{e['dataset_name']}/{split}": M3EXAM for e in languages for split in ("dev", "test")}
    put(tmp_path, "chiayewken/m3exam", files)
    (group,) = choose(tmp_path, "qwen2_m3exam", 1).objects
    tasks = list(group)
    assert len(tasks) == 9
    asked = requests(tasks[2], 1)
    assert len(asked) == 4  # two questions without image, two options
    assert asked[2][0] == (
        "Which event occurred first? (0)\n(1) battle of Gettysburg\n(2) firing on Fort Sumter\n"
        "Answer: 2\n\nRead this.\nWhich event occurred first? (1)\n"
        "(1) battle of Gettysburg\n(2) firing on Fort Sumter\nAnswer:"
    )
    assert [args[1] for args in asked[2:]] == [" 1", " 2"]
    assert m3exam_labels({"options": ["A. x", "B、y", "（3）z", "plain"]}) == ["A", "B", "3", "4"]


def test_indommlu(tmp_path: Path) -> None:
    put(tmp_path, "indolem/IndoMMLU", {"default/train": INDOMMLU})
    (task,) = choose(tmp_path, "qwen2_indommlu", 3).objects
    asked = requests(task, 3)
    assert [args[1] for args in asked] == [" A", " B", " C"] * 2
    assert asked[0][0].count("Jawaban: A\n\n") == 3
    assert asked[0][0].endswith("adalah? 3\nA. Jakarta\nB. Medan\nC. Bali\nJawaban:")


def test_rummlu(tmp_path: Path) -> None:
    put(tmp_path, "ai-forever/MERA", {"rummlu/train": RUMMLU})
    (task,) = choose(tmp_path, "qwen2_rummlu", 5).objects
    asked = requests(task, 5)
    assert asked[-1][0].count("Ответ: ") == 5
    assert asked[-1][0].endswith("Сколько будет 6 + 1?\nA. 1\nB. 2\nC. 3\nD. 4\nОтвет:")


def test_flores(tmp_path: Path) -> None:
    put(tmp_path, "gsarti/flores_101", {"all/dev": FLORES, "all/devtest": FLORES})
    (group,) = choose(tmp_path, "qwen2_flores", 1).objects
    tasks = {task.config.task: task for task in group}
    assert len(tasks) == 16
    prompt, _ = requests(tasks["qwen2_flores::eng-deu"], 1)[1]
    assert prompt == (
        "English: eng sentence 0\nGerman: deu sentence 0\n\nEnglish: eng sentence 1\nGerman:"
    )


def test_tasks_inside_their_group_fail_in_one_line(tmp_path: Path) -> None:
    put(tmp_path, "chiayewken/m3exam", {"english/test": M3EXAM})
    with pytest.raises(DataError, match="qwen2_m3exam cannot be built"):
        choose(tmp_path, "qwen2_m3exam", 0)


def test_mmlu_prompt_is_that_of_qwens_script() -> None:
    """https://github.com/QwenLM/Qwen/blob/main/eval/evaluate_mmlu.py, written out."""
    ours = load_yaml(OWN_TASKS / "qwen2_mmlu.yaml")
    subject = Path(lm_eval.tasks.__file__).parent / "mmlu/default/mmlu_abstract_algebra.yaml"
    theirs = load_yaml(subject)
    assert theirs["description"].strip() == (
        "The following are multiple choice questions (with answers) about abstract algebra."
    )
    assert len(ours["task"]) == len(set(ours["task"])) == 57
    doc = {"question": "Find x.", "choices": ["0", "1", "2", "3"]}
    prompt = jinja2.Template(ours["doc_to_text"]).render(doc)
    assert prompt == "Question: Find x.\nA. 0\nB. 1\nC. 2\nD. 3\nAnswer:"
    assert ours["aggregate_metric_list"] == [{"metric": "acc", "weight_by_size": True}]
