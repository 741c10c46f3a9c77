"""The benchmarks: ONE table from a name to files, prompt, few-shot examples, scorer and budget. evaluate.py runs it.

    TASKS[name]            where the data lies, how a row becomes a document (formats.py), how its answer is scored
    GROUPS[name]           members and how their average is formed: the papers' own tables
    documents(name, root)  all documents of a task;    missing(name, root)  the files that it does not find

To add a benchmark, put its files below the data root and add a row. Here it is chartqa/**/test*.parquet:

    "chartqa": Task("lmms-lab/ChartQA test", "chartqa/test",
                    ask("{images}{question}\\nAnswer the question with a single word.", group="type"), "relaxed", 16),

Chat questions have messages and end at the end of turn only. The few-shot suites of lm-evaluation-harness are plain
text (context, or pairs to be compared by log-probability), with its examples, order of examples and stop strings.

Departures
1. Pictures stand before the text as "<image>\\n", or where the benchmark puts them; SUPERChem's stay inside question
   and options, in order (the released evaluation deletes the marks), and it is asked greedily (there: one sample at
   temperature 1). White space around a question is dropped, and the word <image> in it.
2. No stop strings in chat: the released "Q:" cuts reasoning short. BBH stops at "Q:", the harness at any capital Q.
3. What is sent to a judge there is scored by rule here: OpenRxn and MolParse as molecule, number, yes/no or text,
   whichever the right answer is; SFE by its question types (open-ended ones by ROUGE-L, with --judge, too). MMBench's
   test part has no answers: gold is None.
4. Scores are fractions in [0, 1]; MMBench and V* are percentages there. docs/published.md is in percent.
5. GPQA's choices are shuffled once, by Random(42) in the order of the file. The harness shuffles questions and examples
   apart, so a question can be its own example there; here never.
6. AIME24 and AMC23: mean of 32 samples, temperature 0.6, top-p 0.95. Innovator states none of these; of 8, 16 and 32
   samples only 32 can give all its figures.
7. Innovator's Physics, Chemistry, Mol2Caption and Caption2Mol tests are private. Its prompts meet SciBench, MoleculeNet
   (BBBP, bace, clintox) and ChEBI-20 here: these scores are not comparable with the published ones.
8. mmlu_boxed and gsm8k_boxed (no examples, reasoning, \\boxed{}) stand for MMLU and GSM8K in Innovator's table of
   reasoning models; that table's protocol is not stated, and its base models differ from the general table.
9. OlympicArena is text only, as in its authors' mode for text models: "[figure1]" stays. An answer is judged by its
   row's type (there: by any type that it fits). SciAssess rows about a paper need its text in sciassess/papers/DOI.txt
   (/ as _, pages parted by form feeds); a row without it counts as an error.
10. What Qwen2.5-Math publishes (AIME24, AMC23, MATH-500, MinervaMath) is compared with its tolerance of 1e-4, but whole
    numbers must be equal (there: these, too, have it, and the hundredth and the hundredfold of an answer count), and
    parts of tuples and expressions are exact. OlympiadBench has the tolerance of its rows.
11. MMMU's open answers are numbers within 0.005 or equal texts (there a part of a key phrase is enough). CLUEWSC
    compares the log-probabilities of its letters. Mathematics reports, beside accuracy, strict: right and marked as
    the answer (there: a score of the format).
12. SmolInstruct is the plain mean of its 14 subtasks, as are all groups but agieval (by size).

References: Innovator-VL (arXiv 2601.19325) and its lmms-eval fork; Innovator: Scientific Continued Pretraining with
Fine-grained MoE Upcycling; lm-evaluation-harness 0.4.13; SciAssess; OlympicArena; Qwen2.5-Math's evaluation.
"""
import ast
import base64
import csv
import functools
import hashlib
import os
import random
import re
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import pyarrow as pa

import prompts as p
from common import UserError
from data import BadRow, Limits
from formats import (YES, after_hashes, agieval, arc, as_list, ask, bare, bbh, by_either, by_index, by_letter, by_text,
                     cluewsc, compare, complete, describe_molecule, digit, document, draw_molecule, exam, find, gpqa,
                     hellaswag, in_lines, in_picture, last_box, letters, lines, listed, mathvista, mmmu,
                     molecule_property, olympiad, olympicarena, open_kind, open_kw, pictures, plain, renamed, rows,
                     scibench, sciassess, sfe, smol, superchem, toy, vstar, whole, winogrande, xlrs)
from rewards import LETTERS


@dataclass(frozen=True)
class Task:
    hub: str  # data set, configuration and split at the source; shown when the files are absent
    files: str  # below the data root; alternatives, see formats.find
    load: Callable[[dict, int], dict | None]  # row and its number -> formats.document
    scorer: str  # of scorers.SCORERS; "likelihood": compares log-probabilities
    budget: int = 0  # new tokens of a response; 0 for likelihood
    kw: dict = field(default_factory=dict)  # arguments of the scorer; a document's own come on top
    metric: str = ""  # the reported number of the scorer; empty: its first
    aggregate: str = "mean"  # of scorers.py: mean, group_mean, micro_macro (both), all_in_group, wemath, rmse, avg@k
    judge: bool = False  # --judge may be asked about answers that the scorer cannot read or finds wrong
    corpus: str = ""  # of scorers.py: numbers of all responses together, beside the means of each
    shots: int = 0  # worked examples before a question
    shot_files: str = ""  # where they come from; empty: the documents bring their own
    shot_order: str = "first"  # the first of a question's group; random: drawn for each; spare: see _shots
    join: str = "\n\n"  # behind each example
    stop: tuple[str, ...] = ()  # strings that end a response, beside the end of turn
    samples: int = 1  # responses to a question
    temperature: float = 0.0
    top_p: float = 1.0
    limits: Limits = field(default_factory=lambda: Limits(256 * 28 * 28, 3240000))  # image areas
    columns: tuple[str, ...] = ()  # of csv files without a header
    version: int = 1  # raised with each change that moves scores

    @property
    def request(self) -> str:
        return "loglikelihood" if self.scorer == "likelihood" else "generate"


# ---- the table: parts that several rows share -----------------------------------------------------------------------
MATHVISION = ask(p.THINK + "{question}{choices}", image=lambda r: pictures(r, r.get("decoded_image") or r["image"]),
                 options=lambda r: r["options"] or None, group="subject", id="id", kw=in_picture,
                 more=lambda r: {"choices": f"\nChoices: {lines(r['options'])}" if r["options"] else ""})
MMBENCH = ask("{images}{hinted} There are several options:\n{options}\n" + p.DIRECT, options="A B C D E",
              gold=by_letter, group="category", id="index", cluster=lambda r: int(r["index"]) % 10 ** 6,
              more=lambda r: {"hinted": " ".join(plain(r[k]) for k in ("hint", "question") if r[k] not in
                                                 (None, "", "nan"))})


def realworld(before: str, after: str):
    return ask("{images}{question} {listed}\n" + after, image=lambda r: [base64.b64decode(r["bytes"])], gold=by_letter,
               options=lambda r: bare(r["multi-choice options"]), id="index", more=listed(before),
               group=lambda r: f"{r['category']}/{r['l2-category']}")


def boxed_math(question: str = "question", answer: str = "answer", **kw):
    return ask(f"{{{question}}}", answer, system=p.BOXED, **kw)


QWEN = {"rel_tol": 1e-4}  # of Qwen2.5-Math's numeric_equal
SAMPLED = dict(samples=32, temperature=0.6, top_p=0.95, aggregate="avg@k")
MMLU_FILES = dict(columns=("question", "A", "B", "C", "D", "answer"))

TASKS = {
    "toy": Task("made by toy.py", "heldout/toy.jsonl", toy, "choice", 64, limits=Limits()),

    # ---- vision and language: general
    "ai2d": Task("lmms-lab/ai2d test", "ai2d/test", ask(p.OPTIONS, options="options", gold=by_index), "choice", 16),
    "ai2d_no_mask": Task("Efficient-Large-Model/ai2d-no-mask test", "ai2d_no_mask/test",
                         ask(p.OPTIONS, options="options", gold=by_index), "choice", 16),
    "ocrbench": Task("echo840/OCRBench test", "ocrbench/test",
                     ask("{images}{question}", gold=as_list, group="question_type",
                         kw=lambda r, gold: {"spaces": r["dataset"] != "HME100k"}), "contains", 128),
    "chartqa": Task("lmms-lab/ChartQA test", "chartqa/test",
                    ask("{images}{question}\nAnswer the question with a single word.", group="type"), "relaxed", 16),
    "mmmu_val": Task("lmms-lab/MMMU validation", "mmmu/validation", mmmu(p.DIRECT, p.WORD), "choice", 128,
                     version=2),
    "mmmu_pro_standard": Task("MMMU/MMMU_Pro, standard (10 options), test", "mmmu_pro/standard*10*/test",
                              mmmu("Answer with the option letter from the given choices directly."), "choice", 256),
    "mmmu_pro_vision": Task("MMMU/MMMU_Pro, vision, test", "mmmu_pro/vision/test",
                            ask("{images}" + p.PRO_VISION, options=lambda r: ast.literal_eval(r["options"]),
                                group="subject", id="id"), "choice", 256),
    "mmstar": Task("Lin-Chen/MMStar val", "mmstar/val",
                   ask("{images}{question}\n" + p.DIRECT[:-1], gold=by_letter,
                       group=lambda r: f"{r['category']}/{r['l2_category']}"), "choice", 128,
                   {"labels": "ABCD"}, aggregate="group_mean"),
    "vstar_bench": Task("lmms-lab/vstar-bench test", "vstar_bench/test",
                        ask("{images}{asked}\n{options}\n" + p.DIRECT, "label", by_letter, options=vstar,
                            group="category", more=lambda r: {"asked": r["text"].split("(A)")[0].strip()}),
                        "choice", 16),
    "mmbench_en_dev": Task("lmms-lab/MMBench, en, dev", "mmbench/en/dev", MMBENCH, "choice", 1024,
                           aggregate="all_in_group", judge=True),
    "mmbench_en_test": Task("lmms-lab/MMBench, en, test", "mmbench/en/test",
                            lambda row, i: MMBENCH({"answer": None} | row, i), "choice", 1024,
                            aggregate="all_in_group"),
    "mmerealworld": Task("yifanzhang114/MME-RealWorld-Lmms-eval train", "mmerealworld/train",
                         realworld("The choices are listed below:", p.REALWORLD), "choice", 16),
    "mmerealworld_cn": Task("yifanzhang114/MME-RealWorld-CN-Lmms-eval train", "mmerealworld_cn/train",
                            realworld("选项如下所示:", p.REALWORLD_CN), "choice", 16),
    "docvqa_val": Task("lmms-lab/DocVQA, DocVQA, validation", "docvqa/DocVQA/validation",
                       ask("{images}{question}\n" + p.WORD, "answers", as_list), "anls", 32),
    "infovqa_val": Task("lmms-lab/DocVQA, InfographicVQA, validation", "docvqa/InfographicVQA/validation",
                        ask("{images}{question}\n" + p.WORD, "answers", as_list), "anls", 32),
    "seedbench": Task("lmms-lab/SEED-Bench test", "seedbench/test",
                      ask(p.OPTIONS, options="choice_a choice_b choice_c choice_d", gold=by_letter, group="data_type"),
                      "choice", 128),
    "seedbench_2_plus": Task("doolayer/SEED-Bench-2-Plus test", "seedbench_2_plus/test",
                             ask(p.OPTIONS, options="choice_A choice_B choice_C choice_D", gold=by_letter,
                                 group="question_image_type"), "choice", 16),
    "realworldqa": Task("lmms-lab/RealWorldQA test", "realworldqa/test",
                        ask("{images}{question}", kw=lambda r, gold: {"options": in_lines("question")(r)}
                            if gold and re.fullmatch("[A-H]", gold) else {}), "exact", 16,
                        {"ignore": ("case", "punctuation", "numbers")}, version=2),

    # ---- vision and language: mathematics
    "mathvision_reason_test_reasoning": Task("MathLLMs/MathVision test", "mathvision/test", MATHVISION, "math", 2048,
                                             judge=True),
    "mathvision_reason_testmini_reasoning": Task("MathLLMs/MathVision testmini", "mathvision/testmini", MATHVISION,
                                                 "math", 2048, judge=True),
    "mathverse_testmini_reasoning": Task(
        "CaraJ/MathVerse-lmmseval testmini", "mathverse/testmini",
        ask(p.THINK + "{question}", group="problem_version", kw=in_picture, text_only=True), "math", 2048, judge=True),
    "mathvista_testmini_cot_reasoning": Task(
        "AI4Math/MathVista testmini", "mathvista/testmini",
        ask(p.THINK + "{asked}", gold=by_text, image="decoded_image", options=lambda r: r["choices"] or None, id="pid",
            group="question_type", more=mathvista), "math", 2048, judge=True),
    "wemath_testmini_reasoning": Task(
        "We-Math/We-Math testmini", "wemath/testmini",
        ask(p.THINK + "{question}\n{option}", gold=by_letter, image="image_path", group="knowledge concept",
            cluster="ID", extra=("key",)), "choice", 2048, {"labels": "ABCDEFG"}, aggregate="wemath",
        judge=True),

    # ---- vision and language: science
    "scienceqa": Task("lmms-lab/ScienceQA, ScienceQA-FULL, test", "scienceqa/ScienceQA-FULL/test scienceqa/test",
                      ask("{images}{context}{question}\n{options}\n" + p.DIRECT, options="choices", gold=by_index,
                          group="subject", more=lambda r: {"context": r["hint"] and f"Context: {r['hint']}\n"},
                          text_only=True),
                      "choice", 16),
    "rxnbench_vqa_en": Task("UniParser/RxnBench, RxnBench-VQA, en", "rxnbench/en",
                            ask(p.RXN, options="choices", gold=by_index, group="question_type"), "choice", 10),
    "rxnbench_vqa_zh": Task("UniParser/RxnBench, RxnBench-VQA, zh", "rxnbench/zh",
                            ask(p.RXN_ZH, options="choices", gold=by_index, group="question_type"), "choice", 10),
    "MolParse": Task("InnovatorLab/MolParse test", "molparse/test",
                     ask("{images}{question}", image="images", scorer=open_kind, kw=open_kw), "exact", 256, judge=True,
                     version=2),
    "OpenRxn": Task("InnovatorLab/OpenRxn test", "openrxn/test",
                    ask("{images}{question}", scorer=open_kind, kw=open_kw), "exact", 256, judge=True, version=2),
    "EMVista": Task("InnovatorLab/EMVista test", "emvista/test",
                    ask("{images}{problem}\n" + p.DIRECT, gold=by_letter), "choice", 256, {"labels": "ABCD"}),
    "superchem": Task("ZehuaZhao/SUPERChem", "superchem/train superchem/test", superchem("en", p.SUPERCHEM),
                      "choice-set", 128),
    "superchem_cn": Task("ZehuaZhao/SUPERChem", "superchem/train superchem/test", superchem("zh", p.SUPERCHEM_CN),
                         "choice-set", 128),
    "ProteinLMBench": Task("tsynbio/ProteinLMBench", "proteinlmbench/*.json proteinlmbench/test",
                           ask(p.PROTEIN, gold=digit, options=lambda r: bare(r["options"]),
                               more=listed(field="options"),
                               kw=lambda r, gold: {"labels": "123456789"[:len(r["options"])]}), "choice", 32),
    "sfe-en": Task("PrismaX/SFE, 20250611-en, test, and its images", "sfe/en sfe/*-en/test", sfe, "choice", 1024,
                   judge=True),
    "sfe-zh": Task("PrismaX/SFE, 20250611-zh, test, and its images", "sfe/zh sfe/*-zh/test", sfe, "choice", 1024,
                   judge=True),
    "microvqa": Task("jmhb/microvqa test", "microvqa/test",
                     ask(p.MICRO, "correct_index", by_index, image="images_list", options="choices",
                         mark="  ({}): {}"), "choice", 4096),
    "msearth_mcq": Task("MSEarth/MSEarth_MCQ train", "msearth_mcq/train",
                        ask(p.MSEARTH, "response", by_either, options=in_lines("query")), "choice", 4096,
                        {"labels": "ABCDEFGH"}, version=2),
    "xlrs-lite": Task("initiacms/XLRS-Bench-lite train", "xlrs/train", xlrs, "choice-set", 4096,
                      aggregate="micro_macro"),

    # ---- text: the harness' suites for base models
    "mmlu": Task("cais/mmlu test, dev; github hendrycks/test", "mmlu/test/*.csv mmlu/all/test mmlu/*/test",
                 letters(p.MCQ + "\n\n", "{question}\n{options}\nAnswer:"), "likelihood", shots=5,
                 shot_files="mmlu/dev/*.csv mmlu/all/dev mmlu/*/dev", **MMLU_FILES),
    "bbh": Task("github suzgunmirac/BIG-Bench-Hard, bbh and cot-prompts", "bbh/*.json", bbh, "exact", 1024,
                {"ignore": ()}, shots=3, stop=("</s>", "Q:", "\n\n")),
    "arc_easy": Task("allenai/ai2_arc, ARC-Easy, test, train", "arc/ARC-Easy/test", compare(arc), "likelihood",
                     metric="acc_norm", shots=25, shot_files="arc/ARC-Easy/train", shot_order="random"),
    "arc_challenge": Task("allenai/ai2_arc, ARC-Challenge, test, train", "arc/ARC-Challenge/test", compare(arc),
                          "likelihood", metric="acc_norm", shots=25, shot_files="arc/ARC-Challenge/train",
                          shot_order="random"),
    "hellaswag": Task("Rowan/hellaswag validation, train", "hellaswag/validation", compare(hellaswag), "likelihood",
                      metric="acc_norm", shots=10, shot_files="hellaswag/train", shot_order="spare"),
    "winogrande": Task("allenai/winogrande, winogrande_xl, validation, train; without examples also LLM-Adapters' "
                       "test.json", "winogrande/winogrande_xl/validation winogrande/test.json", winogrande,
                       "likelihood", shots=5, shot_files="winogrande/winogrande_xl/train", shot_order="spare"),
    "nq_open": Task("google-research-datasets/nq_open validation, train", "nq_open/validation",
                    complete("Q: {question}?\nA:", gold=as_list, shot=lambda r: r["answer"][0],
                             description="Answer these questions:\n\n"), "exact", 256, shots=5, join="\n",
                    shot_files="nq_open/train", shot_order="spare", stop=("\n", ".", ",")),
    "agieval_choice": Task("hails/agieval-SUBSET test, 19 subsets", "agieval/*/test", compare(agieval), "likelihood"),
    "agieval_gaokao-mathcloze": Task("hails/agieval-gaokao-mathcloze test",
                                     "agieval/gaokao-mathcloze/test agieval/agieval-gaokao-mathcloze/test",
                                     complete("{query}"), "math", 32, stop=("Q:",)),
    "agieval_math": Task("hails/agieval-math test", "agieval/math/test agieval/agieval-math/test",
                         complete("{query}"), "math", 32, stop=("Q:",)),
    "triviaqa": Task("mandarjoshi/trivia_qa, rc.nocontext, validation, train", "triviaqa/rc.nocontext/validation",
                     complete("Question: {question}?\nAnswer:", gold=lambda value, options: value["aliases"],
                              shot=lambda r: r["answer"]["aliases"][0]), "exact", 256,
                     {"ignore": ("case", "punctuation")}, shots=5, shot_files="triviaqa/rc.nocontext/train",
                     shot_order="spare", stop=("\n", ".", ",")),
    "gpqa": Task("Idavidrein/gpqa, gpqa_main (gated)", "gpqa/gpqa_main.csv gpqa/train", gpqa, "likelihood",
                 metric="acc_norm", shots=5, shot_files="gpqa/gpqa_main.csv gpqa/train", shot_order="spare"),
    "gsm8k": Task("openai/gsm8k, main, test, train", "gsm8k/test",
                  complete("Question: {question}\nAnswer:", gold=after_hashes, shot=lambda r: r["answer"]), "math", 256,
                  shots=5, shot_files="gsm8k/train", shot_order="random", stop=("Question:", "</s>", "<|im_end|>")),
    "gsm8k_cot": Task("openai/gsm8k, main, test", "gsm8k/test",
                      complete("Q: {question}\nA:", gold=after_hashes, examples=p.GSM8K_COT), "math", 256, shots=8,
                      stop=("Q:", "</s>", "<|im_end|>")),
    "cluewsc": Task("CLUE, cluewsc2020, dev", "cluewsc/dev cluewsc/validation", compare(cluewsc), "likelihood"),
    "ceval": Task("ceval/ceval-exam val, dev", "ceval/val/*.csv ceval/*/val",
                  letters("以下是中国关于{}的单项选择题，请选出其中的正确答案。\n\n", "{question}\n{options}\n答案：", p.CEVAL),
                  "likelihood", shots=5, shot_files="ceval/dev/*.csv ceval/*/dev"),
    "cmmlu": Task("haonan-li/cmmlu test, dev", "cmmlu/test/*.csv cmmlu/*/test",
                  letters("以下是关于{}的单项选择题，请直接给出正确答案的选项。\n\n", "{question}\n{options}\n答案：", p.CMMLU),
                  "likelihood", shots=5, shot_files="cmmlu/dev/*.csv cmmlu/*/dev"),

    # ---- text: reasoning
    "mmlu_boxed": Task("cais/mmlu test; github hendrycks/test", "mmlu/test/*.csv mmlu/all/test mmlu/*/test",
                       lambda row, i: ask("{question}\n{options}", gold=by_letter, options="choices", group="subject",
                                          system=p.BOXED)(exam(row), i), "choice", 2048, **MMLU_FILES),
    "mmlu_pro": Task("TIGER-Lab/MMLU-Pro test, validation", "mmlu_pro/test",
                     complete("Question:\n{question}\nOptions:\n{shown}\nAnswer: Let's think step by step.",
                              more=lambda r: {"shown": lines([o.strip() for o in r["options"]])}, group="category",
                              shot=lambda r: r["cot_content"].replace("A: Let's think step by step. ", ""),
                              description=p.MMLU_PRO), "choice", 2048, {"labels": LETTERS}, shots=5,
                     shot_files="mmlu_pro/validation", stop=("Question:",)),
    "gsm8k_boxed": Task("openai/gsm8k, main, test", "gsm8k/test", boxed_math(gold=after_hashes), "math", 2048),
    "cmath": Task("weitianwen/cmath test; github XiaoMi/cmath", "cmath/test",
                  renamed(boxed_math(group="grade"), question="input", answer="golden"), "math", 2048),
    "aime24": Task("Maxwell-Jia/AIME_2024; github QwenLM/Qwen2.5-Math", "aime24/test aime24/train",
                   renamed(boxed_math("problem"), problem="Problem", answer="Answer"), "math", 2048, QWEN, **SAMPLED,
                   version=2),
    "amc23": Task("github QwenLM/Qwen2.5-Math, evaluation/data/amc23", "amc23/test",
                  renamed(boxed_math(gold=whole), question="problem"), "math", 2048, QWEN, **SAMPLED, version=2),
    "math500": Task("HuggingFaceH4/MATH-500 test", "math500/test",
                    boxed_math("problem", group="subject", id="unique_id"), "math", 2048, QWEN, version=2),
    "olympiadbench": Task("github QwenLM/Qwen2.5-Math, evaluation/data/olympiadbench", "olympiadbench/test", olympiad,
                          "math", 2048, version=2),
    "minerva_math": Task("github QwenLM/Qwen2.5-Math, evaluation/data/minerva_math", "minerva_math/test",
                         boxed_math("problem", "solution", gold=last_box, group="type"), "math", 2048, QWEN,
                         version=2),
    "physics": Task("the paper's is private; SciBench: github mandyyyyii/scibench, dataset/original", "scibench/*.json",
                    scibench, "math", 2048, {"rel_tol": 0.05}, version=2),
    "chemistry": Task("the paper's is private; MoleculeNet: BBBP.csv, bace.csv, clintox.csv", "moleculenet/[Bbc]*.csv",
                      molecule_property, "choice", 2048, {"labels": ("True", "False")}, aggregate="group_mean"),
    "mol2caption": Task("the paper's is private; ChEBI-20: github blender-nlp/MolT5", "chebi20/test.txt",
                        describe_molecule, "overlap", 2048, metric="bleu4", corpus="corpus_captions"),
    "caption2mol": Task("the paper's is private; ChEBI-20: github blender-nlp/MolT5", "chebi20/test.txt",
                        draw_molecule, "molecule", 2048, corpus="corpus_molecules"),
}

NAMES = {"split": ";", "ignore": ()}
MOLT5 = {"molecule_captioning": "corpus_captions", "molecule_generation": "corpus_molecules"}  # data of ChEBI-20
SMOL = {  # SMolInstruct's subtask: scorer, budget, arguments, metric
    "forward_synthesis": ("molecule", 128, {}, "tanimoto"), "retrosynthesis": ("molecule", 960, {}, "tanimoto"),
    "molecule_captioning": ("overlap", 1024, {"stem": False}, "rouge1"),
    "molecule_generation": ("molecule", 1024, {}, "tanimoto"),
    "name_conversion-i2f": ("formula", 20, {}, ""), "name_conversion-i2s": ("molecule", 1024, {}, "tanimoto"),
    "name_conversion-s2f": ("formula", 20, {}, ""), "name_conversion-s2i": ("exact", 1024, NAMES, ""),
    "property_prediction-esol": ("regress", 1024, {}, ""), "property_prediction-lipo": ("regress", 1024, {}, ""),
    "property_prediction-bbbp": ("choice", 20, YES, ""), "property_prediction-clintox": ("choice", 20, YES, ""),
    "property_prediction-hiv": ("choice", 20, YES, ""), "property_prediction-sider": ("choice", 20, YES, "")}
TASKS |= {f"smol_{name}": Task("OSU-NLP/SMolInstruct test, as jsonl of question and answer", f"smolinstruct/{name}",
                               smol(p.SMOL[name]), *row, aggregate="rmse" if row[0] == "regress" else "mean",
                               corpus=MOLT5.get(name, ""), version=2 if name == "molecule_captioning" else 1)
          for name, row in SMOL.items()}

CHOICE, CELLS = ("choice", {}), ("table", {})
ITEMS, PAIRS, TRIPLES = (("set-f1", {"arity": n}) for n in (1, 2, 3))
SCIASSESS = {  # the paper's name: folder, scorer and arguments
    "mmlu_pro_biology": ("BIO_mmlu_pro_biology", *CHOICE),
    "biology_chart_qa": ("BIO_biology_chart_qa", *CHOICE),
    "chemical_entities_recognition": ("BIO_chemical_entities_recognition", *ITEMS),
    "compound_disease_recognition": ("BIO_compound_disease_recognition", *PAIRS),
    "disease_entities_recognition": ("BIO_disease_entities_recognition", *ITEMS),
    "gene_disease_function": ("BIO_gene_disease_function", *TRIPLES),
    "mmlu_pro_chemistry": ("CHEM_mmlu_pro_chemistry", *CHOICE),
    "oled_property_extraction": ("CHEM_oled_property_extraction", *CELLS),
    "polymer_chart_qa": ("CHEM_polymer_chart_qa", *CHOICE),
    "polymer_composition_qa": ("CHEM_polymer_composition_qa", *CHOICE),
    "polymer_property_extraction": ("CHEM_polymer_property_extraction", *CELLS),
    "solubility_extraction": ("CHEM_solubility_extraction", *CELLS),
    "reactant_qa": ("CHEM_reactant_qa", *CHOICE),
    "reaction_mechanism_qa": ("CHEM_reaction_mechanism_qa", *CHOICE),
    "material_qa": ("MAT_material_qa", *CHOICE),
    "alloy_chart_qa": ("MAT_alloy_chart_qa", *CHOICE),
    "composition_extraction": ("MAT_composition_extraction", *CELLS),
    "temperature_qa": ("MAT_temperature_qa", *CHOICE),
    "sample_differentiation": ("MAT_sample_differentiation", *CHOICE),
    "mmlu_pro_health": ("MED_mmlu_pro_health", *CHOICE),
    "affinity_extraction": ("MED_affinity_extraction", *CELLS),
    "drug_chart_qa": ("MED_drug_chart_qa", *CHOICE),
    "markush_to_molecule": ("MED_markush2mol", "molecule", {}, "tanimoto"),
    "molecule_in_document": ("MED_mol_in_document", "choice", YES)}
TASKS |= {f"sciassess_{name}": Task("github sci-assess/SciAssess, sciassess/Registry/data", f"sciassess/**/{folder}/"
                                    "samples.jsonl", sciassess, scorer, 5000, *rest, version=2)
          for name, (folder, scorer, *rest) in SCIASSESS.items()}
ARENAS = ("Math", "Physics", "Chemistry", "Biology", "Geography", "Astronomy")
TASKS |= {f"olympicarena_{name.lower()}": Task(f"GAIR/OlympicArena, {name}, val", f"olympicarena/{name}/val",
                                               olympicarena, "math", 2048, version=2) for name in ARENAS}


# ---- groups: the papers' tables -------------------------------------------------------------------------------------
@dataclass(frozen=True)
class Group:
    members: tuple[str, ...]  # tasks and groups
    average: str = "mean"  # of the members; entries: of the members' members; size: weighted by their documents
    table: str = ""  # heading in docs/published.md


VL, TEXT = "Innovator-VL, arXiv 2601.19325, table 2", "Innovator, table 2: general"
SCIENCE, REASON = "Innovator, table 3: science", "Innovator, table 5: reasoning"
GROUPS = {
    "vision-language": Group(("general", "math", "science"), "entries", VL),
    "general": Group((
        "ai2d", "ai2d_no_mask", "ocrbench", "chartqa", "mmmu_val", "mmmu_pro_standard", "mmstar", "vstar_bench",
        "mmbench_en_dev", "mmbench_en_test", "mmerealworld", "mmerealworld_cn", "docvqa_val", "infovqa_val",
        "seedbench", "seedbench_2_plus", "realworldqa"), table=VL),
    "math": Group((
        "mathvision_reason_test_reasoning", "mathvision_reason_testmini_reasoning", "mathverse_testmini_reasoning",
        "mathvista_testmini_cot_reasoning", "wemath_testmini_reasoning"), table=VL),
    "science": Group((
        "scienceqa", "rxnbench_vqa_en", "rxnbench_vqa_zh", "MolParse", "OpenRxn", "EMVista", "superchem",
        "superchem_cn", "SmolInstruct", "ProteinLMBench", "sfe-en", "sfe-zh", "microvqa", "msearth_mcq", "xlrs-lite"),
        table=VL),
    "SmolInstruct": Group(tuple(f"smol_{name}" for name in SMOL)),
    "rxnbench_vqa": Group(("rxnbench_vqa_en", "rxnbench_vqa_zh")),
    "mmmu_pro": Group(("mmmu_pro_standard", "mmmu_pro_vision")),
    "text": Group((
        "mmlu", "bbh", "arc_easy", "arc_challenge", "hellaswag", "winogrande", "nq_open", "agieval", "triviaqa",
        "gpqa", "gsm8k", "cmath", "cluewsc", "ceval", "cmmlu"), table=TEXT),
    "agieval": Group(("agieval_choice", "agieval_gaokao-mathcloze", "agieval_math"), "size"),
    "scientific": Group(("sciassess", "olympicarena"), "entries", SCIENCE),
    "sciassess": Group(tuple(f"sciassess_{name}" for name in SCIASSESS), table=SCIENCE),
    "olympicarena": Group(tuple(f"olympicarena_{name.lower()}" for name in ARENAS), table=SCIENCE),
    "reasoning": Group((
        "mmlu_boxed", "mmlu_pro", "aime24", "amc23", "math500", "olympiadbench", "gsm8k_boxed", "cmath",
        "minerva_math"), table=REASON),
    "reasoning_science": Group(("physics", "chemistry", "mol2caption", "caption2mol"), table=REASON),
}
ALIASES = {"mathvision": "mathvision_reason_testmini_reasoning",  # names that differ between script, yaml and README
           "Molparse": "MolParse", "superchem_en": "superchem"}


def expand(names: list[str]) -> list[str]:
    """Tasks of names, groups and aliases, each once, in order."""
    tasks = []
    for name in (ALIASES.get(n, n) for n in names):
        assert name in TASKS or name in GROUPS, f"no task or group {name!r}; there are {', '.join([*GROUPS, *TASKS])}"
        tasks += [name] if name in TASKS else expand(GROUPS[name].members)
    return list(dict.fromkeys(tasks))


def average(name: str, scores: dict[str, float], sizes: dict[str, int] | None = None, without=()) -> float | None:
    """Score of a group from those of tasks; sizes: their documents. None while a member is missing that is not among
    `without`."""
    if name in scores or name in TASKS:
        return scores.get(name)
    members = GROUPS[name].members
    if GROUPS[name].average == "entries":
        members = [entry for m in members for entry in GROUPS[m].members]
    members = [m for m in members if m not in without]
    values = [average(m, scores, sizes, without) for m in members]
    if None in values or not members:
        return None
    weights = [sizes[m] for m in members] if GROUPS[name].average == "size" else [1] * len(values)
    return sum(w * v for w, v in zip(weights, values)) / sum(weights)


def wins(ours: dict[str, float], others: dict[str, list[float]]) -> int:
    """Tasks on which ours is not below any other; as in Innovator's table 3 a tie counts for ours."""
    return sum(ours[name] >= max(others[name]) for name in ours)


@functools.cache
def published(table: str) -> tuple[list[str], dict[str, list[float]]]:
    """Models and their scores in percent by task or group, of one table of docs/published.md."""
    text = (Path(__file__).parent / "docs" / "published.md").read_text(encoding="utf-8")
    section = text.partition(f"## {table}\n")[2].partition("\n## ")[0]
    cells = [[c.strip() for c in line.strip("|").split("|")] for line in section.splitlines() if line.startswith("| ")]
    assert cells, f"docs/published.md has no table {table!r}"
    return cells[0][1:], {name: [float(c) for c in row] for name, *row in cells[1:]}


# ---- documents ------------------------------------------------------------------------------------------------------
def missing(name: str, root: Path, shots: int | None = None) -> str | None:
    """The files that a task needs and does not find, as a sentence; None if all are there."""
    task = TASKS[name]
    examples = task.shot_files if (task.shots if shots is None else shots) else ""
    lack = [files for files in (task.files, examples) if files and not find(root, files)]
    if not lack:
        return None
    other = f" (or the task {name}_cot, whose examples come with it)" if f"{name}_cot" in TASKS else ""
    hint = f"; --shots 0{other} needs no {examples}" if examples in lack else ""
    return f"{name} needs {' and '.join(lack)} below {root} ({task.hub}){hint}"


def _read(task: Task, root: Path, files: str) -> Iterator[tuple[Path, dict]]:
    """Files and their documents. What cannot be read as a row, or is none of the task, is a UserError: it ends the task
    and not the run."""
    i = -1
    for path in find(root, files):
        found = rows(path, task.columns)
        while True:
            try:
                row = next(found, None)
                assert row is None or isinstance(row, dict), f"it is no object with fields but {str(row)[:80]}"
            except (BadRow, ValueError, KeyError, TypeError, AssertionError, OSError, EOFError, csv.Error, zlib.error,
                    pa.ArrowException) as e:
                raise UserError(f"{path}: row {i + 2} of {files} cannot be read ({type(e).__name__}: {e})") from None
            if row is None:
                break
            i += 1
            try:
                doc = task.load(row | {"_root": Path(root), "_file": path.relative_to(root)}, i)
            except BadRow as e:  # it counts as wrong and is never left out
                doc = document(None) | {"error": f"{path.name}, row {i + 1}: {e}"}
            except (KeyError, TypeError, ValueError, IndexError, AttributeError, SyntaxError, OSError, csv.Error) as e:
                have = ", ".join(f"{k} (empty)" if v in (None, "", []) else str(k) for k, v in row.items())
                raise UserError(f"{path}: row {i + 1} of {files} is not one of this task ({type(e).__name__}: {e}); "
                                f"its fields: {have}") from e
            if doc is not None:
                doc["id"] = doc["id"] or f"{i:05d}"
                doc["cluster"] = doc["id"] if doc["cluster"] is None else str(doc["cluster"])
                yield path, doc


def documents(name: str, root: Path, shots: int | None = None, store: Path | None = None) -> list[dict]:
    """All documents of a task: examples in front, scorer and arguments filled in. shots: another number of examples.
    store: a folder for the pictures that lie inside parquet files; without it their bytes stay in memory."""
    task, docs, seen = TASKS[name], [], {}
    count = task.shots if shots is None else shots
    if lack := missing(name, root, count):
        raise UserError(lack)
    assert not count or task.shots, f"{name} has no worked examples: shots must be 0, not {count}"
    examples = _read(task, root, task.shot_files) if count and task.shot_files else []
    pool = [(d["group"], d["shot"]) for _, d in examples if not d["error"]]
    rng = random.Random(1234)  # the harness' seed and order of draws
    for path, doc in _read(task, root, task.files):
        if doc["id"] in seen:
            raise UserError(f"{name}: {path}: the id {doc['id']} was already used, in {seen[doc['id']]}")
        seen[doc["id"]] = path
        chosen = _shots(task, doc, pool, count, rng)
        if len(chosen) < count and not doc["error"]:
            raise UserError(f"{name}: {len(chosen)} worked examples for {doc['group'] or 'it'}, {count} are needed")
        front = doc["description"] + "".join(shot + task.join for shot in chosen)
        doc["context"] = doc["context"] and front + doc["context"]
        doc["pairs"] = [(front + context, continuation) for context, continuation in doc["pairs"]]
        doc["scorer"], doc["metric"] = doc["scorer"] or task.scorer, doc["metric"] or task.metric
        doc["kw"] = (task.kw if doc["scorer"] == task.scorer else {}) | doc["kw"]
        doc["images"] = [_stored(image, store) if store else image for image in doc["images"]]
        docs.append({k: v for k, v in doc.items() if k not in ("description", "examples", "shot")})
    if not docs:
        raise UserError(f"{name}: no questions in {', '.join(map(str, find(root, task.files)))}")
    return docs


def _shots(task: Task, doc: dict, pool: list[tuple[str, str]], count: int, rng: random.Random) -> list[str]:
    """The examples in front of a document, of a pool of (group, example). spare: where a set has no test part the
    harness draws one more, lest the question itself is among them."""
    if task.shot_order == "first":
        return (doc["examples"] or [shot for group, shot in pool if group == doc["group"]])[:count]
    drawn = [shot for _, shot in rng.sample(pool, count + (task.shot_order == "spare"))] if count else []
    return [shot for shot in drawn if task.shot_order == "random" or shot != doc["shot"]][:count]


def _stored(image, store: Path):
    """The path of a picture; bytes go into a file named by their hash."""
    if not isinstance(image, bytes):
        return image
    path = store / f"{hashlib.sha1(image).hexdigest()}.img"
    if not path.exists():
        store.mkdir(parents=True, exist_ok=True)
        temporary = path.with_suffix(f".{os.getpid()}")
        temporary.write_bytes(image)
        os.replace(temporary, path)
    return path
