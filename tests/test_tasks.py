"""Every benchmark of tasks.py from its file to its prompt. Rows in tests/benchmarks are real; MADE ones are made in the
published columns."""
import base64
import csv
import io
import json
import shutil
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

import formats
import prompts
import tasks
from common import UserError
from data import Tokenizer, encode
from tasks import GROUPS, TASKS, documents, expand, missing, published

REAL = Path(__file__).parent / "benchmarks"


def picture(shade: int = 0) -> bytes:
    out = io.BytesIO()
    Image.new("RGB", (56, 56), (shade, 0, 0)).save(out, "PNG")
    return out.getvalue()


def im(shade: int = 0) -> dict:
    return {"bytes": picture(shade), "path": "a.png"}


L, W = prompts.DIRECT, prompts.WORD
TH = ("Think and solve the following question step by step. Please put your thinking and analysis procedure within "
      "<think></think>. Put ONLY your final answer within <answer></answer>.\n<image>\n")
RED = ["red", "blue", "green", "grey"]
ABCD = "\nA. red\nB. blue\nC. green\nD. grey\n"
BOX = "Please reason step by step, and put your final answer within \\boxed{}."
INLINE = ["(A) red", "(B) blue", "(C) green", "(D) grey", "(E) none"]
CHART = dict(image=im(), question="How many bars?", answer="14", type="human_test")
MMB = dict(image=im(), question="Which colour?", hint="It is warm.", **dict(zip("ABCD", RED)), answer="A",
           category="colour",
           source="x", split="dev") | {"L2-category": "perception"}
REALW = {"bytes": base64.b64encode(picture()).decode(), "question": "Which colour?", "multi-choice options": INLINE,
         "answer": "B", "category": "Perception/OCR", "l2-category": "sign", "index": 3}
SFE = dict(id="M001/1", field="Physics", images=[im(), im(1)], question="Which colour?", options=["A. red", "B. blue"],
           question_type="mcq", answer="B")
CHEM = dict(
    question_images=[("q.png", picture(1)), ("a.png", picture(2))], options_images=[("b.png", picture(3))], uuid="u1",
    question_en="See <MultiModal>![s](q.png)</MultiModal> and <MultiModal>![s](a.png)</MultiModal>. Which?",
    question_zh="见<MultiModal>![s](a.png)</MultiModal>。哪个？", question_type="multiple_choice", answer_en=["A", "C"],
    answer_zh=["B"], options_en={"A": "<MultiModal>![o](b.png)</MultiModal>", "B": "two", "C": "three", "D": None},
    options_zh={"A": "一", "B": "二", "C": None, "D": None})

MADE = {  # file below the root: rows, as parquet or jsonl
    "ai2d/data/test-00000-of-00002.parquet": [dict(image=im(), question="What colour is it? ", options=RED,
                                                   answer="2")],
    "ai2d/data/test-00001-of-00002.parquet": [dict(image=im(1), question="And <image> here?", options=RED[:2],
                                                   answer="0")],
    "ai2d_no_mask/data/test-00000-of-00001.parquet": [dict(image=im(), question="Which?", options=RED, answer="3")],
    "ocrbench/data/test-00000-of-00001.parquet": [
        dict(image=im(), question="what is written in the image?", answer=["CENTRE", "Centre"], dataset="IIIT5K",
             question_type="Regular Text Recognition"),
        dict(image=im(), question="Write the formula.", answer=["x ^ 2"], dataset="HME100k",
             question_type="Handwritten Mathematical Expression Recognition")],
    "chartqa/data/test-00000-of-00001.parquet": [CHART, CHART | {"type": "augmented_test", "answer": "0.52"}],
    "mmmu/data/validation-00000-of-00001.parquet": [
        dict(id="validation_Art_Theory_3", question="Which of <image 2> and <image 1>?",
             question_type="multiple-choice",
             options="['<image 3>', 'blue']", answer="A", **{f"image_{k}": im(k) if k < 4 else None for k in range(1,
             8)}),
        dict(id="validation_Finance_12", question="<image 1> How much?", question_type="open", options="[]",
             answer="['24/7', '3.429']", **{f"image_{k}": im(k) if k < 2 else None for k in range(1, 8)})],
    "mmmu_pro/standard (10 options)/test-00000-of-00001.parquet": [
        dict(id="test_History_1", question="Who? <image 1>", options=str(list("abcdefghij")), answer="J",
             subject="History", image_1=im())],
    "mmmu_pro/vision/test-00000-of-00001.parquet": [
        dict(id="test_Math_2", image=im(), options=str(RED), answer="C", subject="Math")],
    "mmstar/val.parquet": [dict(index=0, image=im(), question="Which?\nOptions: A: red, B: blue, C: green, D: grey",
                                answer="B", category="coarse perception", l2_category="image emotion")],
    "vstar_bench/data/test-00000-of-00001.parquet": [
        dict(image=im(), text="What colour is the car? (A) red (B) blue (C) green (D) grey", label="B", question_id="0",
             category="direct_attributes")],
    "mmbench/en/dev-00000-of-00001.parquet": [
        MMB | {"index": 241}, MMB | {"index": 1000241, "A": "grey", "D": "red", "answer": "D", "hint": "nan"},
        MMB | {"index": 242, "C": "nan", "D": "nan"}],
    "mmbench/en/test-00000-of-00001.parquet": [MMB | {"index": 7, "answer": "nan"}],
    "mmerealworld/data/train-00000-of-00001.parquet": [REALW],
    "mmerealworld_cn/data/train-00000-of-00001.parquet": [REALW | {"question": "什么颜色？"}],
    "docvqa/DocVQA/validation-00000-of-00001.parquet": [
        dict(image=im(), question="What is the date?", answers=["8 May", "May 8"], questionId="1")],
    "docvqa/InfographicVQA/validation-00000-of-00001.parquet": [
        dict(image=im(), question="What share?", answers=["20%"], questionId="2")],
    "seedbench/data/test-00000-of-00001.parquet": [
        dict(image=[im(k) for k in range(3)], question="Which?", **dict(zip(("choice_a", "choice_b", "choice_c",
        "choice_d"),
             RED)), answer="D", data_type="video")],
    "seedbench_2_plus/data/test-00000-of-00001.parquet": [
        dict(image=im(), question="Which?", **dict(zip(("choice_A", "choice_B", "choice_C", "choice_D"), RED)),
             answer="C", question_image_type="Map")],
    "realworldqa/data/test-00000-of-00001.parquet": [
        dict(image=im(), question="How many cars? Please answer directly with a single word or number.", answer="3")],
    "mathvision/data/test-00000-of-00001.parquet": [  # layout of the hub; the answer's options are in the picture
        dict(id="1", question="Which is opposite?\n<image1>", options=[], answer="C", image="images/1.jpg",
             decoded_image=im(), subject="solid geometry", level=1)],
    "mathverse/testmini.parquet": [
        dict(question="Find x.\nChoices:\nA:1\nB:2", answer="B", image=im(), problem_version="Vision Only"),
        dict(question="Find y.", answer="3", image=None, problem_version="Text Only")],
    "mathvista/data/testmini-00000-of-00001.parquet": [
        dict(pid="1", question="Which is longer?", choices=["red", "blue"], unit=None, precision=None, answer="blue",
             question_type="multi_choice", answer_type="text", decoded_image=im(), image="images/1.jpg"),
        dict(pid="2", question="How long is it?", choices=None, unit="cm", precision=1.0, answer="1.2",
             question_type="free_form", answer_type="float", decoded_image=im(), image="images/2.jpg")],
    "wemath/data/testmini-00000-of-00001.parquet": [
        dict(ID="12", split="testmini", key=key, question="How large?", option="A. 1; B. 2; C. 3", answer="C",
             image_path=im()) | {"knowledge concept": "Area"} for key in ("2steps_1", "2steps_2", "2steps_multi")],
    "scienceqa/ScienceQA-FULL/test-00000-of-00001.parquet": [
        dict(image=im(), question="Which?", choices=["red", "blue"], hint="A look at colours.", answer=1,
             subject="natural science"),
        dict(image=None, question="Which now?", choices=["red", "blue"], hint="", answer=0, subject="social science")],
    "rxnbench/en/test.parquet": [dict(image=im(), question="Which reagent?", choices=RED, answer=0)],
    "rxnbench/zh/test.parquet": [dict(image=im(), question="哪个？", choices=RED, answer=1)],
    "openrxn/data/test-00000-of-00001.parquet": [
        dict(image=im(), question="Give the product.", answer="CC(=O)O"), dict(image=im(), question="Yield?",
        answer="85%"),
        dict(image=im(), question="Is it heated?", answer="Yes"), dict(image=im(), question="Solvent?",
        answer="acetic acid")],
    "molparse/data/test-00000-of-00001.parquet": [
        dict(images=[im()], question="Write E-SMILES.", answer="*c1ccccc1<sep><a>0:R[1]</a>")],
    "emvista/data/test-00000-of-00001.parquet": [
        dict(image=im(), problem="Which phase?\nA. red\nB. blue\nC. green\nD. grey", answer="B")],
    "superchem/data/train-00000-of-00001.parquet": [
        CHEM, CHEM | dict(uuid="u2", question_type="fill_blank", answer_en=["NaCl"], answer_zh=["NaCl"])],
    "proteinlmbench/evaluation.json": [
        dict(question="Which enzyme?", options=["option 1: red", "option 2: blue", "option 3: green"],
             answer="option 2",
             explanation="")],
    "sfe/en/test.parquet": [
        SFE, SFE | dict(id="C001/2", question_type="exact_match", answer="42", options=[]),
        SFE | dict(id="L001/3", question_type="open_ended", answer="a warm front", options=[]),
        SFE | dict(id="E011/4", question_type="exact_match", answer="[1,2,3,4; 5,6,7,8]", options=[])],
    "sfe/zh/test.parquet": [SFE | dict(question="什么颜色？")],
    "microvqa/data/test-00000-of-00001.parquet": [
        dict(images_list=[im(), im(1)], question="What is seen?", choices=["red", "blue"], correct_index=1)],
    "msearth_mcq/data/train-00000-of-00001.parquet": [
        dict(image=im(), query="<image>\nWhich layer?\nA. red\nB. blue", response="B. blue")],
    "xlrs/data/train-00000-of-00001.parquet": [
        {"image": [im()], "question": "What is there?\n", "multi-choice options": INLINE[:4], "answer": answer,
         "index": k,
         "category": category, "l2-category": "x"} for k, (category, answer) in enumerate(
            [("Counting/Overall counting", "A"),
             ("Land use classification/Overall Land use classification", "AC")])],
    "arc/ARC-Easy/test-00000-of-00001.parquet": [
        dict(question="Which gas?", choices={"text": ["oxygen", "iron"], "label": ["1", "2"]}, answerKey="1")],
    "arc/ARC-Easy/train-00000-of-00001.parquet": [
        dict(question=f"Is {k} even?", choices={"text": ["yes", "no"], "label": ["A", "B"]}, answerKey="AB"[k % 2])
        for k in range(30)],
    "hellaswag/data/validation-00000-of-00001.parquet": [
        dict(activity_label="Making tea", ctx_a="A woman [header] boils water.", ctx_b="she", label="1",
             endings=["[title] leaves", "pours [step] it", "sings", "sleeps"])],
    "hellaswag/data/train-00000-of-00001.parquet": [
        dict(activity_label="Cooking", ctx_a=f"Pot {k} stands.", ctx_b="it", label="0", endings=list("wxyz"))
        for k in range(12)],
    "nq_open/validation.jsonl": [dict(question="who wrote faust", answer=["Goethe", "J. W. Goethe"])],
    "nq_open/train.jsonl": [dict(question=f"who is {k}", answer=[f"name {k}"]) for k in range(9)],
    "agieval/aqua-rat/data/test-00000-of-00001.parquet": [
        dict(query="Q: 2+2? Answer Choices: (A)3 (B)4\nA: Among A through B, the answer is", choices=["A", "B"],
             gold=[1])],
    "agieval/jec-qa-kd/data/test-00000-of-00001.parquet": [dict(query="问题：", choices=list("ABCD"), gold=[0, 2])],
    "agieval/math/data/test-00000-of-00001.parquet": [dict(query="Q: 2+2?\nA: The answer is", answer="4")],
    "agieval/gaokao-mathcloze/data/test-00000-of-00001.parquet": [dict(query="问题：2+2=\n答案：", answer="4")],
    "triviaqa/rc.nocontext/validation-00000-of-00001.parquet": [
        dict(question="Who wrote Faust?", answer=dict(value="Goethe", aliases=["Goethe", "Johann Goethe"]))],
    "triviaqa/rc.nocontext/train-00000-of-00001.parquet": [
        dict(question=f"Which is {k}?", answer=dict(value=str(k), aliases=[f"n{k}", str(k)])) for k in range(9)],
    "gpqa/gpqa_main.csv": [
        {"Question": f"Why {k}?", "Correct Answer": f"right {k}\n", "Incorrect Answer 1": "one",
         "Incorrect Answer 2": "two",
         "Incorrect Answer 3": "three", "High-level domain": "Physics"} for k in range(8)],
    "gsm8k/train.jsonl": [dict(question=f"{k}+1?", answer=f"It is.\n#### {k + 1}") for k in range(9)],
    "cluewsc/dev.jsonl": [
        dict(text="手机响了，它在床上。", label="true", target=dict(span1_index=0, span1_text="手机", span2_index=5,
                                                          span2_text="它")),
        dict(text="手机响了，它在床上。", label="false", target=dict(span1_index=7, span1_text="床", span2_index=5,
                                                           span2_text="它"))],
    "ceval/dev/accountant_dev.csv": [dict(id=k, question=f"题{k}", **dict(zip("ABCD", "甲乙丙丁")), answer="A",
                                          explanation="")
                                     for k in range(5)],
    "ceval/val/accountant_val.csv": [dict(id=0, question="问题", **dict(zip("ABCD", "甲乙丙丁")), answer="C")],
    "cmmlu/dev/anatomy.csv": [{"": k, "Question": f"题{k}", **dict(zip("ABCD", "甲乙丙丁")), "Answer": "B"}
                              for k in range(5)],
    "cmmlu/test/anatomy.csv": [{"": 0, "Question": "问题", **dict(zip("ABCD", "甲乙丙丁")), "Answer": "D"}],
    "cmath/test.jsonl": [dict(input="小明有3个苹果，又买了4个，一共有几个？", golden="7", grade=1, reasoning_step=1)],
    "mmlu_pro/data/validation-00000-of-00001.parquet": [
        dict(question=f"Which {k}?", options=["x ", "y"], answer="B", category="law", answer_index=1,
             cot_content=f"A: Let's think step by step. Case {k}. The answer is (B).") for k in range(5)],
    "mmlu_pro/data/test-00000-of-00001.parquet": [
        dict(question="Which law?", options=[f"law {k}" for k in range(10)], answer="J", category="law",
             cot_content="")],
    "amc23/test.jsonl": [dict(id=0, problem="2+2?", answer=27.0)],
    **{f"smolinstruct/{name}.jsonl": [dict(id=f"{name}_5", task=name, question="<SMILES> CCO </SMILES> What about it?",
                                           answer=gold)]
       for name, gold in {**dict.fromkeys(("forward_synthesis", "retrosynthesis", "molecule_generation",
                                           "name_conversion-i2s"), "<SMILES> CC=O.O </SMILES>"),
                          **dict.fromkeys(("name_conversion-i2f", "name_conversion-s2f"), "C2H6O"),
                          "name_conversion-s2i": "ethanol;water", "molecule_captioning": "It is a primary alcohol.",
                          "property_prediction-esol": "-0.77", "property_prediction-lipo": "2.5",
                          **dict.fromkeys(("property_prediction-bbbp", "property_prediction-clintox",
                                           "property_prediction-hiv", "property_prediction-sider"), "No")}.items()},
    **{f"olympicarena/{subject}/val-00000-of-00001.parquet": [
        dict(id=f"{subject}_1", prompt="Find x in [figure1].\nPut it in \\boxed{}.", answer=["3"], answer_type="NV",
             type_sequence=None, language="EN", modality="multi-modal", subject=subject),
        dict(id=f"{subject}_2", prompt="Which?", answer=["A", "C"], answer_type="MC", type_sequence=None, language="EN",
             modality="text-only", subject=subject)] for subject in tasks.ARENAS},
}
ASSESS = {  # by scorer: what a row adds
    "choice": dict(ideal="b) blue", option=["a) red", "b) blue"]), "set-f1": {},
          "molecule": dict(ideal=["NCCC(O)CC[Li]"]),
    "table": dict(ideal="Nickname,PCE_max(%),FF\nPBTTT,2.3,0.48\n", compare_fields=["PCE_max(%)", "FF"],
                  index="Nickname")}
ENTITIES = {1: "(aspirin),(ethanol)", 2: "(aspirin,fever)", 3: "(BCL6, LOF, myeloma)"}
for name, (folder, scorer, kw, *_) in tasks.SCIASSESS.items():
    extra = dict(ideal=ENTITIES[kw["arity"]]) if kw.get("arity") else ASSESS[scorer]
    extra = dict(ideal=["Yes"], doi="10.1/x", pages=[2, 2]) if name == "molecule_in_document" else extra
    content = "<PDF>" if scorer == "table" else "Which?\n\na) red\nb) blue"
    paper = dict(doi="10.1/x", pages=[1, -1]) if scorer == "table" else {}
    MADE[f"sciassess/{folder}/samples.jsonl"] = [
        dict(input=[dict(role="system", content="You are an expert."), dict(role="user", content=content)]) | extra
                                                 | paper]
MADE["sciassess/MAT_composition_extraction/samples.jsonl"][0].update(
    ideal=",Composition,Composition\n,Al,Mg\nTX32,0.4 wt.%,94.6 wt.%\n", index="AlloyName",
    compare_fields=[["Composition", "Al"], ["Composition", "Mg"]])


@pytest.fixture(scope="module")
def root(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("benchmarks") / "data"
    shutil.copytree(REAL, root)
    for name, rows in MADE.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.suffix == ".parquet":
            schema = None
            if "question_images" in rows[0]:  # maps, as the hub stores them
                table = pa.Table.from_pylist(rows)
                links = pa.map_(pa.string(), pa.binary())
                schema = pa.schema([f.with_type(links) if f.name.endswith("_images") else f for f in table.schema])
            pq.write_table(pa.Table.from_pylist(rows, schema), path)
        elif path.suffix == ".csv":
            with open(path, "w", newline="", encoding="utf-8") as f:
                writer = csv.DictWriter(f, list(rows[0]))
                writer.writeheader()
                writer.writerows(rows)
        else:
            path.write_text(json.dumps(rows) if path.suffix == ".json" else "".join(json.dumps(r) + "\n" for r in rows))
    (root / "sciassess/papers").mkdir()
    (root / "sciassess/papers/10.1_x.txt").write_text("page one\fpage two\f")
    (root / "heldout").mkdir()
    (root / "heldout/toy.jsonl").write_text(json.dumps(dict(
        id="t1", question="Which?", options=["red", "blue"], answer="B", answer_type="multiple-choice", image=None,
        discipline="chemistry", chance=0.5)) + "\n")
    return root


def text(doc: dict) -> str:
    return doc["messages"][-1]["content"]


CHAT = {  # first document: text, gold, options, group
    "toy": ("Which?\nA. red\nB. blue\n" + L, "B", ["red", "blue"], "chemistry"),
    "ai2d": ("<image>\nWhat colour is it?" + ABCD + L, "C", RED, ""),
    "ai2d_no_mask": ("<image>\nWhich?" + ABCD + L, "D", RED, ""),
    "ocrbench": ("<image>\nwhat is written in the image?", ["CENTRE", "Centre"], None, "Regular Text Recognition"),
    "chartqa": ("<image>\nHow many bars?\nAnswer the question with a single word.", "14", None, "human_test"),
    "mmmu_val": ("<image>\n<image>\n<image>\nWhich of <image 2> and <image 1>?\nA. <image 3>\nB. blue\n\n" + L, "A",
                 ["<image 3>", "blue"], "Art and Design/Art_Theory"),
    "mmmu_pro_standard": ("<image>\nWho? <image 1>\n" + "\n".join(f"{x.upper()}. {x}" for x in "abcdefghij")
                          + "\n\nAnswer with the option letter from the given choices directly.", "J",
                          list("abcdefghij"), "Humanities and Social Science/History"),
    "mmmu_pro_vision": ("<image>\nAnswer with the option letter from the given choices directly. The last line of your "
                        "response should be of the following format: 'Answer: $LETTER' (without quotes) where LETTER "
                        "is one of options.", "C", RED, "Math"),
    "mmstar": ("<image>\nWhich?\nOptions: A: red, B: blue, C: green, D: grey\nAnswer with the option's letter from the "
               "given choices directly", "B", None, "coarse perception/image emotion"),
    "vstar_bench": ("<image>\nWhat colour is the car?" + ABCD + L, "B", RED, "direct_attributes"),
    "mmbench_en_dev": ("<image>\nIt is warm. Which colour? There are several options:" + ABCD + L, "A", RED, "colour"),
    "mmbench_en_test": ("<image>\nIt is warm. Which colour? There are several options:" + ABCD + L, None, RED,
                        "colour"),
    "mmerealworld": ("<image>\nWhich colour? The choices are listed below:\n" + "\n".join(INLINE) + "\nSelect the best "
                     "answer to the above multiple-choice question based on the image. Respond with only the letter "
                     "(A, B, C, D, or E) of the correct option.\nThe best answer is: ", "B", RED + ["none"],
                     "Perception/OCR/sign"),
    "mmerealworld_cn": ("<image>\n什么颜色？ 选项如下所示:\n" + "\n".join(INLINE) + "\n根据图像选择上述多项选择题的最佳答案。只需"
                        "回答正确选项的字母（A, B, C, D 或 E）。\n最佳答案为： ", "B", RED + ["none"],
                        "Perception/OCR/sign"),
    "docvqa_val": ("<image>\nWhat is the date?\n" + W, ["8 May", "May 8"], None, ""),
    "infovqa_val": ("<image>\nWhat share?\n" + W, ["20%"], None, ""),
    "seedbench": ("<image>\n" * 3 + "Which?" + ABCD + L, "D", RED, "video"),
    "seedbench_2_plus": ("<image>\nWhich?" + ABCD + L, "C", RED, "Map"),
    "realworldqa": ("<image>\nHow many cars? Please answer directly with a single word or number.", "3", None, ""),
    "mathvision_reason_test_reasoning": (TH + "Which is opposite?\n<image1>", "C", None, "solid geometry"),
    "mathvision_reason_testmini_reasoning": (
        TH + "Two squares $9 \\mathrm{~cm} \\times 9 \\mathrm{~cm}$ overlap so as to form a rectangle $9 \\mathrm{~cm} "
        "\\times 13 \\mathrm{~cm}$ as shown. Find the area of the region in which the two squares overlap.\n<image1>\n"
        "Choices: A. $36 \\mathrm{~cm}^{2}$\nB. $45 \\mathrm{~cm}^{2}$\nC. $54 \\mathrm{~cm}^{2}$\n"
        "D. $63 \\mathrm{~cm}^{2}$\nE. $72 \\mathrm{~cm}^{2}$", "B",
        [f"${n} \\mathrm{{~cm}}^{{2}}$" for n in (36, 45, 54, 63, 72)], "metric geometry - area"),
    "mathverse_testmini_reasoning": (TH + "Find x.\nChoices:\nA:1\nB:2", "B", None, "Vision Only"),
    "mathvista_testmini_cot_reasoning": (
        TH + "Question: Which is longer?\nChoices:\n(A) red\n(B) blue\nHint: Please answer the question and provide "
        "the correct option letter, e.g., A, B, C, D, at the end.", "B", ["red", "blue"], "multi_choice"),
    "wemath_testmini_reasoning": (TH + "How large?\nA. 1; B. 2; C. 3", "C", None, "Area"),
    "scienceqa": ("<image>\nContext: A look at colours.\nWhich?\nA. red\nB. blue\n" + L, "B", ["red", "blue"],
                  "natural science"),
    "rxnbench_vqa_en": ("<image>\nQuestion: Which reagent?\nChoices:" + ABCD + "Based on the image and the question, "
                        "choose the most appropriate answer.\n**Only output a single letter (A, B, C, or D)**. Do NOT "
                        "output any other text or explanation.", "A", RED, ""),
    "rxnbench_vqa_zh": ("<image>\n问题: 哪个？\n选项:" + ABCD + "请根据图像和问题，从以上四个选项中选择最合适的答案。\n只输出单个"
                        "字母 (A, B, C 或 D)，不要输出选项内容，也不要输出任何解释。", "B", RED, ""),
    "OpenRxn": ("<image>\nGive the product.", "CC(=O)O", None, ""),
    "MolParse": ("<image>\nWrite E-SMILES.", "*c1ccccc1<sep><a>0:R[1]</a>", None, ""),
    "EMVista": ("<image>\nWhich phase?" + ABCD + L, "B", None, ""),
    "superchem": ("Question:\n\nSee <image> and <image>. Which?\n\nA: <image>\nB: two\nC: three\n\n\nSelect the best "
                  "answer to the above multiple-choice question based on the image. Respond with only the letter of "
                  "the correct option.", "AC", None, ""),
    "superchem_cn": ("问题:\n\n见<image>。哪个？\n\nA: 一\nB: 二\n\n\n根据图像选择上述单选题的最佳答案。请仅输出正确选项的字母。", "B",
                     None, ""),
    "ProteinLMBench": (
        "Answer the multiple-choice question based solely on the provided context. \nIf you are still unsure about the "
        "answer, output option 7.\nSelect only ONE correct option by its number. Start your response with 'The correct "
        "option is' followed by the option number ONLY. eg: \"The correct option is Option X.\"\n\n Question: \nWhich "
        "enzyme?\n Options: \noption 1: red\noption 2: blue\noption 3: green\n\nThe correct option is:", "2", RED[:3],
                       ""),
    "sfe-en": ("<image>\n<image>\nYou are an expert in Physics and need to solve the following question.\nThe "
               "question is a multiple-choice question. Answer with the option letter from the given "
               "choices.\n\nWhich colour?\nA. red\nB. blue", "B", ["red", "blue"], "Physics"),
    "sfe-zh": ("<image>\n<image>\nYou are an expert in Physics and need to solve the following question.\nThe "
               "question is a multiple-choice question. Answer with the option letter from the given "
               "choices.\n\n什么颜色？\nA. red\nB. blue", "B", ["red", "blue"], "Physics"),
    "microvqa": ("<image>\n<image>\nThe following is a multiple choice question (with answers). \nThink step by step "
                 "and then output the answer in the format of \"The answer is (X)\" at the end, where X is the "
                 "correct letter choice.\n\nWhat is seen?\n\nOptions:\n  (A): red\n  (B): blue\n\n", "B", ["red",
                 "blue"], ""),
    "msearth_mcq": (
        "<image>\n\nYou are tasked with answering a multiple-choice question about the given input image.\n\nWhich "
        "layer?\nA. red\nB. blue\n\nBased on the image, select the correct option (e.g., 'A', 'B', 'C') or directly "
        "state the correct option content.\n\nThe output must be written in **JSON format** using the structure "
        "below:\n```json\n{\n    \"answer\": \"Correct option or short answer\",\n    \"Explanation\": \"Reasoning "
        "explaining how to derive the correct answer.\" \n}\n```\n", "B", ["red", "blue"], ""),
    "xlrs-lite": ("<image>\nWhat is there?The choices are listed below:\n" + "\n".join(INLINE[:4])
                  + "\n\nSelect the best "
                  "answer for the multiple-choice question based on the image. Only respond with the letter "
                  "corresponding to the correct answer (A, B, C, D).\nThe answer is:", "A", RED, "Counting/Overall "
                  "counting"),
    "mmlu_boxed": ("A lesion causing compression of the facial nerve at the stylomastoid foramen will cause "
                   "ipsilateral\nA. paralysis of the facial muscles.\nB. paralysis of the facial muscles and loss of "
                   "taste.\nC. paralysis of the facial muscles, loss of taste and lacrimation.\nD. paralysis of the "
                   "facial muscles, loss of taste, lacrimation and decreased salivation.", "A", ..., "anatomy"),
    "gsm8k_boxed": (..., "18", None, ""),
    "cmath": ("小明有3个苹果，又买了4个，一共有几个？", "7", None, "1"),
    "aime24": (..., "204", None, ""), "amc23": ("2+2?", "27", None, ""),
    "math500": ("Convert the point $(0,3)$ in rectangular coordinates to polar coordinates.  Enter your answer in the "
                "form $(r,\\theta),$ where $r > 0$ and $0 \\le \\theta < 2 \\pi.$", "\\left( 3, \\frac{\\pi}{2} "
                "\\right)", None,
                "Precalculus"),
    "olympiadbench": (..., "2", None, "Combinatorics"),
    "minerva_math": (..., "1.6", None, "Introduction to Astronomy (8.282J Spring 2006)"),
    "physics": ("You are a helpful assistant. Suppose that $10.0 \\mathrm{~mol} \\mathrm{C}_2 "
                "\\mathrm{H}_6(\\mathrm{~g})$ is confined to $4.860 \\mathrm{dm}^3$ at $27^{\\circ} \\mathrm{C}$. "
                "Predict the pressure exerted by the ethane from the perfect gas. Give the answer in "
                "$\\mathrm{atm}$.", "50.7", None, "atkins"),
    "chemistry": (
        "Role: You are a top AI assistant specializing in molecular chemistry and drug discovery, proficient in "
        "molecular property prediction.\nTask: Evaluate whether the specified molecule penetrates the blood-brain "
        "barrier. Output \"True\" or \"False\".\nMolecule to analyze: [ClH0].[C][C][Branch1][C][C][N][C][C][Branch1]"
        "[C][O][C][O][C][=C][C][=C][C][=C][C][=C][C][=C][Ring1][#Branch2][Ring1][=Branch1]\nPlease reason step by "
                  "step.", "True", None, "BBBP"),
    "mol2caption": (..., ..., None, ""), "caption2mol": (..., ..., None, ""),
    **{f"smol_{name}": (f"{prompts.SMOL[name]}\n\n<SMILES> CCO </SMILES> What about it?", ..., None, "")
       for name in tasks.SMOL},
    **{f"sciassess_{name}": (..., ..., ..., "") for name in tasks.SCIASSESS},
    **{f"olympicarena_{subject.lower()}": ("Find x in [figure1].\nPut it in \\boxed{}.", "3", None, "multi-modal")
       for subject in tasks.ARENAS},
}


@pytest.mark.parametrize("name", CHAT)
def test_chat_prompt(root, name):
    docs = documents(name, root)
    want, gold, options, group = CHAT[name]
    doc = docs[0]
    assert want is ... or text(doc) == want
    assert gold is ... or doc["gold"] == gold
    assert options is ... or doc["options"] == options
    assert doc["group"] == group and not doc["context"] and not doc["pairs"]
    for doc in docs:
        assert doc["error"] or text(doc).count("<image>") == len(doc["images"])
        assert doc["id"] and 0 <= doc["chance"] <= 1 and (doc["error"] is None or name == "chemistry")


PLAIN = {  # first document: the whole context without examples, end of its examples, gold
    "bbh": ("Given a series of navigation instructions, determine whether one would end up back at the starting "
            "point.\n\nQ: If you follow these instructions, do you return to the starting point? Always face forward. "
            "Take 1 step backward. Take 9 steps left. Take 2 steps backward. Take 6 steps forward. Take 4 steps "
            "forward. Take 4 steps backward. Take 3 steps right.\nOptions:\n- Yes\n- No\nA: Let's think step by "
            "step.\n", "So the answer is Yes.\n\n", "No"),
    "nq_open": ("Answer these questions:\n\nQ: who wrote faust?\nA:", "\n", ["Goethe", "J. W. Goethe"]),
    "triviaqa": ("Question: Who wrote Faust??\nAnswer:", "\n\n", ["Goethe", "Johann Goethe"]),
    "agieval_math": ("Q: 2+2?\nA: The answer is", "", "4"),
    "agieval_gaokao-mathcloze": ("问题：2+2=\n答案：", "", "4"),
    "gsm8k": ("Question: Janet’s ducks lay 16 eggs per day. She eats three for breakfast every morning and bakes "
              "muffins for her friends every day with four. She sells the remainder at the farmers' market daily for "
              "$2 per fresh duck egg. How much in dollars does she make every day at the farmers' market?\nAnswer:",
              "\n\n", "18"),
    "gsm8k_cot": ("Q: Janet’s ducks lay 16 eggs per day. She eats three for breakfast every morning and bakes muffins "
                  "for her friends every day with four. She sells the remainder at the farmers' market daily for $2 "
                  "per fresh duck egg. How much in dollars does she make every day at the farmers' market?\nA:",
                  "The answer is 8.\n\n", "18"),
    "mmlu_pro": ("The following are multiple choice questions (with answers) about law. Think step by step and then "
                 "finish your answer with \"the answer is (X)\" where X is the correct letter "
                 "choice.\nQuestion:\nWhich law?\nOptions:\n"
                 + "".join(f"{x}. law {k}\n" for k, x in enumerate("ABCDEFGHIJ")) + "Answer: Let's think step by step.",
                 "Answer: Let's think step by step. Case 4. The answer is (B).\n\n", "J"),
}


@pytest.mark.parametrize("name", PLAIN)
def test_completion_prompt(root, name):
    context, end, gold = PLAIN[name]
    zero, full = documents(name, root, shots=0)[0], documents(name, root)[0]
    assert zero["context"] == context and zero["gold"] == full["gold"] == gold and not zero["messages"]
    assert TASKS[name].shots == 0 or len(full["context"]) > len(context)
    question = context[max(0, context.rfind("\n\nQ: ") + 2):] if name in ("bbh", "nq_open") else context
    question = context[context.index("Question:\n"):] if name == "mmlu_pro" else question
    assert full["context"].endswith(end + question) and TASKS[name].stop


PAIRS = {  # first document without examples: context, continuations, gold, options, group
    "mmlu": ("The following are multiple choice questions (with answers) about anatomy.\n\nA lesion causing "
             "compression of the facial nerve at the stylomastoid foramen will cause ipsilateral\nA. paralysis of the "
             "facial muscles.\nB. paralysis of the facial muscles and loss of taste.\nC. paralysis of the facial "
             "muscles, loss of taste and lacrimation.\nD. paralysis of the facial muscles, loss of taste, lacrimation "
             "and decreased salivation.\nAnswer:",
             [" A", " B", " C", " D"], 0, list("ABCD"), "anatomy"),
    "arc_easy": ("Question: Which gas?\nAnswer:", [" oxygen", " iron"], 0, ["oxygen", "iron"], ""),
    "hellaswag": ("Making tea: A woman boils water. She", ["  leaves", " pours it", " sings", " sleeps"], 1,
                  [" leaves", "pours it", "sings", "sleeps"], ""),
    "agieval_choice": ("Q: 2+2? Answer Choices: (A)3 (B)4\nA: Among A through B, the answer is", [" A", " B"], [1],
                       ["A", "B"],
                       "aqua-rat"),
    "gpqa": ("Here are some example questions from experts. Answer the final question yourself, following the format "
             "of the previous questions exactly.\nQuestion: Why 0?\nChoices:\n(A) three\n(B) two\n(C) right 0\n(D) "
             "one\nAnswer:",
             [" (A)", " (B)", " (C)", " (D)"], 2, ["(A)", "(B)", "(C)", "(D)"], "Physics"),
    "cluewsc": ("手机响了，它在床上。\n此处，“它”是否指代“手机”？\nA. 是\nB. 否\n请从“A”，“B”中进行选择。\n答：", [" A", " B"], 0, ["A", "B"], ""),
    "ceval": ("以下是中国关于注册会计师的单项选择题，请选出其中的正确答案。\n\n问题\nA. 甲\nB. 乙\nC. 丙\nD. 丁\n答案：", [" A", " B", " C", " D"],
              2, list("ABCD"), "accountant"),
    "cmmlu": ("以下是关于解剖学的单项选择题，请直接给出正确答案的选项。\n\n问题\nA. 甲\nB. 乙\nC. 丙\nD. 丁\n答案：", [" A", " B", " C", " D"], 3,
              list("ABCD"), "anatomy"),
}


@pytest.mark.parametrize("name", PAIRS)
def test_choices_by_log_probability(root, name):
    context, continuations, gold, options, group = PAIRS[name]
    doc = documents(name, root, shots=0)[0]
    assert [c for c, _ in doc["pairs"]] == [context] * len(continuations)
    assert [c for _, c in doc["pairs"]] == continuations
    assert (doc["gold"], doc["options"], doc["group"]) == (gold, options, group)
    assert TASKS[name].request == "loglikelihood" and TASKS[name].budget == 0
    if TASKS[name].shots:
        full = documents(name, root)[0]
        assert full["pairs"][0][0].count("\n\n") >= TASKS[name].shots


def test_arc_challenge_is_arc_easy_with_other_files():
    a, b = TASKS["arc_easy"], TASKS["arc_challenge"]
    assert b.files == a.files.replace("Easy", "Challenge") and b.shot_files == a.shot_files.replace("Easy", "Challenge")
    assert (a.shots, a.metric, a.shot_order) == (b.shots, b.metric, b.shot_order) == (25, "acc_norm", "random")


def test_winogrande_compares_beginnings(root):
    doc = documents("winogrande", root, shots=0)[0]
    assert doc["pairs"] == [("Sarah was a much better surgeon than Maria so Sarah", " always got the easier cases."),
                            ("Sarah was a much better surgeon than Maria so Maria", " always got the easier cases.")]
    assert doc["gold"] == 1
    with pytest.raises(UserError, match="winogrande needs winogrande/winogrande_xl/train below"):
        documents("winogrande", root)


def test_every_task_is_tested():
    assert set(TASKS) == {*CHAT, *PLAIN, *PAIRS, "arc_challenge", "winogrande"}


def test_mmlu_five_examples_of_the_subject(root):
    docs = documents("mmlu", root)
    dev = list(csv.reader(open(REAL / "mmlu/dev/high_school_mathematics_dev.csv", newline="")))
    shots = "".join(f"{q.strip()}\nA. {a}\nB. {b}\nC. {c}\nD. {d}\nAnswer: {gold}\n\n" for q, a, b, c, d, gold in dev)
    doc = next(d for d in docs if d["group"] == "high_school_mathematics")
    head = "The following are multiple choice questions (with answers) about high school mathematics.\n\n"
    assert doc["pairs"][0][0].startswith(head + shots) and len(dev) == 5


def test_random_examples_are_the_harness_draws(root):
    """lm-evaluation-harness 0.4.13, seed 1234: drawn for each question in turn; one more without a test part."""
    import random
    rng = random.Random(1234)
    docs, train = documents("gsm8k", root), MADE["gsm8k/train.jsonl"]
    for doc in docs:
        shots = "".join(f"Question: {r['question']}\nAnswer: {r['answer']}\n\n" for r in rng.sample(train, 5))
        assert doc["context"].startswith(shots)
    drawn = random.Random(1234).sample(MADE["nq_open/train.jsonl"], 6)[:5]
    shots = "".join(f"Q: {r['question']}?\nA: {r['answer'][0]}\n" for r in drawn)
    assert documents("nq_open", root)[0]["context"] == f"Answer these questions:\n\n{shots}Q: who wrote faust?\nA:"
    own = documents("gpqa", root)
    assert all(f"Why {k}?" not in d["pairs"][0][0].rpartition("Question:")[0] for k, d in enumerate(own))


def test_bbh_examples(root):
    docs = documents("bbh", root)
    sports = next(d for d in docs if d["group"] == "sports_understanding")["context"]
    assert sports.count("\n\nQ: ") == 4 and "step by step. " not in sports and "canary" not in sports
    assert documents("bbh", root, shots=1)[0]["context"].count("\n\nQ: ") == 2
    with pytest.raises(AssertionError, match="no worked examples"):
        documents("chartqa", root, shots=2)


def test_molecules_in_the_papers_prompts(root):
    caption, drawing = documents("mol2caption", root)[0], documents("caption2mol", root)[0]
    assert text(caption).startswith("Role: You are a helpful assistant. You are a professional chemist.\nTask: Your "
                                    "task is to generate a natural, concise, and chemically accurate description of a "
                                    "molecule")
    assert text(caption).endswith("[C]\nThink step by step.")
    assert caption["gold"].startswith("The molecule is a steroid ester that is methyl")
    assert drawing["gold"] == "C[C@]12CCC(=O)C=C1CC[C@@H]3[C@@H]2C(=O)C[C@]\\4([C@H]3CC/C4=C/C(=O)OC)C"
    assert f"Description: {caption['gold']}\nPlease think step by step and return the final answer." in text(drawing)
    bad = [d for d in documents("chemistry", root) if d["error"]]
    assert [d["error"][:40] for d in bad] == ["clintox.csv, row 5: SMILES *C(=O)[C@H](C"]


def test_other_rows(root):
    def second(name): return documents(name, root)[1]
    assert text(second("ai2d")) == "<image>\nAnd  here?\nA. red\nB. blue\n" + L and second("ai2d")["gold"] == "A"
    assert second("ocrbench")["kw"] == {"spaces": False} and documents("ocrbench", root)[0]["kw"] == {"spaces": True}
    assert text(second("mmmu_val")) == "<image>\n<image 1> How much?\n\n" + W
    assert (second("mmmu_val")["gold"], second("mmmu_val")["scorer"]) == (["24/7", "3.429"], "math")
    assert text(second("mathverse_testmini_reasoning")) == TH.replace("<image>\n", "") + "Find y."
    assert documents("mathverse_testmini_reasoning", root)[0]["kw"] == {"labels": "ABCDE"}
    assert text(second("mathvista_testmini_cot_reasoning")) == (
        TH + "Question: How long is it? (Unit: cm)\nHint: Please answer the question requiring a floating-point "
        "number with one decimal place and provide the final value, e.g., 1.2, 1.3, 1.4, at the end.")
    assert text(second("scienceqa")) == "Which now?\nA. red\nB. blue\n" + L and second("scienceqa")["images"] == []
    copies = documents("mmbench_en_dev", root)
    assert [d["cluster"] for d in copies] == ["241", "241", "242"] and copies[2]["options"] == ["red", "blue"]
    assert text(copies[1]).startswith("<image>\nWhich colour? There are several options:\nA. grey\n")
    assert [d["scorer"] for d in documents("OpenRxn", root)] == ["molecule", "math", "choice", "exact"]
    assert [d["scorer"] for d in documents("sfe-en", root)] == ["choice", "math", "overlap", "iou"]
    assert documents("MolParse", root)[0]["scorer"] == "molecule"
    assert second("mmmu_val")["kw"] == {"abs_tol": 0.005}
    assert second("xlrs-lite")["gold"] == "AC" and text(second("xlrs-lite")).endswith("The answer(s) is(are):")
    assert second("cluewsc")["gold"] == 1 and documents("agieval_choice", root)[1]["gold"] == [0, 2]
    steps = documents("wemath_testmini_reasoning", root)
    assert [d["extra"]["key"] for d in steps] == ["2steps_1", "2steps_2", "2steps_multi"]
    assert {d["cluster"] for d in steps} == {"12"}
    assert documents("math500", root)[0]["messages"][0] == {"role": "system", "content": BOX}
    assert [d["kw"]["abs_tol"] for d in documents("olympiadbench", root)] == [1e-8, 0.1, 1e-8]
    assert len(documents("physics", root)) == 2  # worked examples of the book are left out
    arena = documents("olympicarena_math", root)[1]
    assert (arena["scorer"], arena["gold"], arena["messages"][0]["content"]) == ("choice-set", "A, C", prompts.ARENA)


def test_open_answers_that_only_look_like_molecules(tmp_path):
    scorers = pytest.importorskip("scorers")
    pytest.importorskip("rdkit")
    golds = ["THF", "DMSO", "Pd(PPh3)4", "(S)", "TFA,DCM", "CC(=O)O", "c1ccccc1<sep><a>0:R[1]</a>"]
    docs = documents("OpenRxn", at(tmp_path, openrxn__test=[
        dict(image=str(REAL / "none.png"), question=f"What is it? {k}", answer=g) for k, g in enumerate(golds)]))
    assert [d["scorer"] for d in docs] == ["exact"] * 5 + ["molecule"] * 2
    for d in docs:
        assert next(iter(scorers.score(d["scorer"], d["gold"], d["gold"], **d["kw"]).numbers.values())) == 1


@pytest.mark.parametrize("name,file,row,right,wrong", [
    ("realworldqa", "realworldqa__test",
     dict(image="a.png", question="Where?\nA. Left\nB. Right\nC. Ahead", answer="A"),
     ("A", "Left", "A. Left", "It is Left."), ("B", "Right")),
    ("realworldqa", "realworldqa__test", dict(image="a.png", question="Is it red?", answer="Yes"), ("Yes", "yes."),
     ("No",)),
    ("msearth_mcq", "msearth_mcq__train", dict(image="a.png", query="Which panel?\nA. B\nB. C\nC. A", response="A"),
     ("A", '{"answer": "A"}'), ("C",)),
    ("msearth_mcq", "msearth_mcq__train", dict(image="a.png", response="C", query="A. Smith et al. saw it.\nWhich?\n"
                                               "A.red\nb. blue\nC。green"), ("C", '{"answer": "green"}'), ("blue", "A")),
    ("msearth_mcq", "msearth_mcq__train", dict(image="a.png", response="B", query="C. elegans is\nA. red\nB. blue\n"
                                               "C. green"), ("B", "blue"), ("red", "C")),
    ("msearth_mcq", "msearth_mcq__train", dict(image="a.png", query="Which?\nA. red\nB. blue", response="blue"),
     ("B", '{"answer": "blue", "Explanation": "red is A"}', '{"answer": "B"}'), ('{"answer": "red"}', "A")),
    ("mmmu_val", "mmmu__validation",
     dict(id="validation_Math_1", question="How many? <image 1>", options="[]", answer="24.333", question_type="open",
          image_1="a.png"), ("24.33", "The answer is 24.33."), ("24.3",))])
def test_options_and_decimals_that_answers_leave_out(tmp_path, name, file, row, right, wrong):
    scorers = pytest.importorskip("scorers")
    (tmp_path / "a.png").write_bytes(picture())
    row = {k: str(tmp_path / v) if v == "a.png" else v for k, v in row.items()}
    doc, = documents(name, at(tmp_path, **{file: [row]}))
    for texts, value in ((right, 1), (wrong, 0)):
        for said in texts:
            found = scorers.score(doc["scorer"], said, doc["gold"], **(TASKS[name].kw | doc["kw"]))
            assert next(iter(found.numbers.values())) == value, said


def at(folder: Path, **tables) -> Path:
    """Rows as jsonl files; __ stands for a folder."""
    for name, rows in tables.items():
        path = folder / f"{name.replace('__', '/')}.jsonl"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("".join(json.dumps(r) + "\n" for r in rows))
    return folder


def test_sfe_as_the_hub_has_it(tmp_path):
    """Folders 20250611-en and 20250611-zh with a test split each, names of pictures, and images/ beside them."""
    row = SFE | {"images": ["a.png", "./images/b.png"]}
    (tmp_path / "sfe/20250611-en").mkdir(parents=True)
    pq.write_table(pa.Table.from_pylist([row]), tmp_path / "sfe/20250611-en/test-00000-of-00001.parquet")
    (tmp_path / "sfe/20250611-zh").mkdir()
    pq.write_table(pa.Table.from_pylist([row | {"question": "？"}]),
                   tmp_path / "sfe/20250611-zh/test-00000-of-00001.parquet")
    doc, zh = documents("sfe-en", tmp_path)[0], documents("sfe-zh", tmp_path)[0]
    assert doc["images"] == [tmp_path / "sfe/images/a.png", tmp_path / "sfe/images/b.png"] == zh["images"]
    assert "Which colour?" in text(doc) and "？" in text(zh)


def test_rxnbench_as_the_hub_has_it(tmp_path):
    meta = dict(title="t", journal="j", doi="d", url="u")
    (tmp_path / "rxnbench/data").mkdir(parents=True)
    for language, kind in (("en", "Mechanism"), ("zh", None)):
        rows = [dict(image=im(), question="Which?", choices=RED, answer=3, meta_info=meta, question_type=kind)]
        pq.write_table(pa.Table.from_pylist(rows), tmp_path / f"rxnbench/data/{language}-00000-of-00001.parquet")
    en, zh = documents("rxnbench_vqa_en", tmp_path), documents("rxnbench_vqa_zh", tmp_path)
    assert [(d["gold"], d["group"]) for d in en + zh] == [("D", "Mechanism"), ("D", "")]


def test_superchem_rows(root, tmp_path):
    blank = documents("superchem", root)[1]
    assert (blank["scorer"], blank["gold"], len(blank["images"])) == ("exact", "NaCl", 3)
    plain = {k: v for k, v in CHEM.items() if not k.endswith("_images")} | dict(
        question_en="Which?", options_en={"A": "one", "B": "two"}, answer_en="AB")  # a text-only problem
    lost = plain | dict(uuid="u2", options_en={"A": "<MultiModal>![o](c.png)</MultiModal>"})
    doc, bad = documents("superchem", at(tmp_path, superchem__test=[plain, lost]))
    assert (doc["images"], doc["gold"], doc["kw"]) == ([], "AB", {"labels": "AB"})
    assert "row 2: <MultiModal>![o](c.png)</MultiModal> names no image of question_images or options" in bad["error"]


ARENA_TYPES = {  # answer type: answer, scorer, a right and a wrong response
    "SC": (["B"], "choice", "B", "A"), "MC": (["A", "C"], "choice-set", "C, A", "A"),
    "TF": (["False"], "choice", "False", "True"), "NV": (["0.5"], "math", "0.500001", "0.51"),
    "SET": (["1", "2"], "math", "\\{2, 1\\}", "1"), "IN": (["[0, 1)"], "math", "[0,1)", "[0,1]"),
    "EX": (["$x^2+1$"], "math", "1+x^2", "x^2"), "EQ": (["$y=2x$"], "math", "y=2x", "y=3x"),
    "EQ, sides": (["$y=2x$"], "math", "y-2x=0", "2x"), "EQ, exchanged": (["$y=2x$"], "math", "2x=y", "2y=x"),
    "EQ, named": (["$y=2x$"], "math", "y = 2x", "z=2x"), "EQ, derivative": (["$y'=2y$"], "math", "2y=y'", "y=2y"),
    "EQ, second": (["$y''+y=0$"], "math", "y''=-y", "y=-y"), "EQ, number": (["$x=1$"], "math", "1=x", "x=2"),
    "TUP": (["(1, 2)"], "math", "(1,2)", "(2,1)"), "MPV": (["3", "4"], "math", "3, 4", "3, 5"),
    "MPV, rounded": (["0.333333", "2"], "math", "0.33333, 2", "0.3333, 2"),
    "TUP, rounded": (["(0.333333, 2)"], "math", "(0.33333, 2)", "(2, 0.33333)"),
    "MA": (["3", "-3"], "math", "-3, 3", "3")}


@pytest.mark.parametrize("kind", ARENA_TYPES)
def test_olympicarena_answer_types(tmp_path, kind):
    """All columns of the hub. SET also without braces."""
    scorers = pytest.importorskip("scorers")
    pytest.importorskip("math_verify")
    answer, scorer, right, wrong = ARENA_TYPES[kind]
    row = dict(id="Math_1", problem="p", prompt="Find it.", figure_urls=None, answer=answer, solution="", unit=None,
               answer_type=kind.partition(",")[0], answer_sequence=None, type_sequence=None, test_cases=None,
               subject="Math", language="EN", modality="text-only")
    doc = documents("olympicarena_math", at(tmp_path, olympicarena__Math__val=[row]))[0]
    assert doc["scorer"] == scorer
    for said, value in ((right, 1), (wrong, 0), (right.replace("\\{", "").replace("\\}", ""), 1)):
        assert scorers.score(scorer, f"\\boxed{{{said}}}", doc["gold"], **doc["kw"]).numbers["acc"] == value, said


@pytest.mark.parametrize("name,file,row,said", [
    ("sfe-en", "sfe__en__test", {k: v for k, v in SFE.items() if k != "images"} | {"images": None, "answer": None},
     r"row 1 of sfe/en .*AttributeError.*its fields: .*answer \(empty\), images \(empty\)"),
    ("rxnbench_vqa_en", "rxnbench__en", dict(image=None, question="Which?", answer=1),
     "KeyError: 'choices'.*its fields: image"),
    ("superchem", "superchem__test", dict(question="Which?"), "KeyError: 'options_en'.*its fields: question"),
    ("olympicarena_math", "olympicarena__Math__val", dict(id="1", problem="p", answer=["3"]),
     "KeyError: 'answer_type'.*its fields: id, problem, answer")])
def test_other_layouts_name_row_and_field(tmp_path, name, file, row, said):
    with pytest.raises(UserError, match=said):
        documents(name, at(tmp_path, **{file: [row]}))


def test_sciassess_papers_and_tables(root):
    doc = documents("sciassess_molecule_in_document", root)[0]
    assert text(doc) == "page two\n\nWhich?\n\na) red\nb) blue"
    assert doc["messages"][0]["content"] == "You are an expert."
    table = documents("sciassess_composition_extraction", root)[0]
    assert text(table) == "page one\npage two\n"
    assert table["gold"] == "AlloyName,Composition Al,Composition Mg\nTX32,0.4 wt.%,94.6 wt.%"
    assert table["kw"] == {"fields": ["Composition Al", "Composition Mg"], "index": "AlloyName"}
    choice = documents("sciassess_material_qa", root)[0]
    assert (choice["gold"], choice["options"]) == ("B", ["red", "blue"])
    lost = root / "sciassess/papers/10.1_x.txt"
    lost.rename(lost.with_suffix(".away"))
    doc = documents("sciassess_molecule_in_document", root)[0]
    lost.with_suffix(".away").rename(lost)
    assert "the text of the paper 10.1/x is not there" in doc["error"]


@pytest.mark.parametrize("name", sorted(TASKS))
def test_right_answer_scores_one(root, name):
    """The scorer takes the document's gold and arguments, and the gold itself is right."""
    scorers = pytest.importorskip("scorers")
    for doc in documents(name, root, shots=0) if TASKS[name].request == "generate" else []:
        if doc["gold"] is None or doc["error"]:
            continue
        gold = doc["gold"][0] if isinstance(doc["gold"], list) else doc["gold"]
        answer = gold if doc["scorer"] in ("table", "set-f1", "iou", "contains",
                                           "overlap") else f"<answer>{gold}</answer>"
        found = scorers.score(doc["scorer"], answer, doc["gold"], doc["metric"], **doc["kw"])
        right = 0.0 if doc["scorer"] == "regress" else 1.0
        assert next(iter(found.numbers.values())) == pytest.approx(right, abs=1e-3), (name, doc["id"], found)


def test_pictures_in_parquet_are_stored(root, tmp_path):
    doc = documents("superchem", root, store=tmp_path / "store")[0]
    assert [p.read_bytes() for p in doc["images"]] == [picture(1), picture(2), picture(3)]
    assert documents("superchem", root, store=tmp_path / "store")[0]["images"] == doc["images"]
    assert documents("mathvision_reason_testmini_reasoning", root)[0]["images"] == [root / "mathvision/images/748.jpg"]


def test_chat_prompts_encode(root, toy):
    tok = Tokenizer(toy / "tokenizer")
    for name in ("superchem", "mmmu_val", "mmerealworld", "mathvision_reason_testmini_reasoning", "seedbench"):
        doc = documents(name, root)[0]
        out = encode(doc["messages"], doc["images"], tok, TASKS[name].limits, generate=True)
        assert len(out.grids) == len(doc["images"]) and all(56 * 56 < 14 * 14 * h * w <= 3240000 for _, h,
                                                            w in out.grids)


def test_absent_files_are_named(tmp_path):
    assert missing("ai2d", tmp_path) == f"ai2d needs ai2d/test below {tmp_path} (lmms-lab/ai2d test)"
    assert "arc/ARC-Easy/test and arc/ARC-Easy/train" in missing("arc_easy", tmp_path)
    assert "ARC-Easy/train" not in missing("arc_easy", tmp_path, shots=0)
    with pytest.raises(UserError, match="lmms-lab/ai2d"):
        documents("ai2d", tmp_path)


def test_rows_that_are_none_of_the_task(root, tmp_path):
    for rows, error in (([{"question": "x"}], "not one of this task .KeyError"), ([{"image": None}], "KeyError")):
        (tmp_path / "chartqa").mkdir(exist_ok=True)
        (tmp_path / "chartqa/test.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
        with pytest.raises(UserError, match=error):
            documents("chartqa", tmp_path)
    row = dict(question="How many?", answer="3", type="human_test", image={"bytes": b"", "path": None})
    (tmp_path / "chartqa/test.jsonl").write_text(json.dumps(row | {"image": {"path": None}}) + "\n")
    assert "neither bytes nor path" in documents("chartqa", tmp_path)[0]["error"]


def test_shots_without_their_files(tmp_path):
    for name, said in (("winogrande", "; --shots 0 needs no winogrande/winogrande_xl/train"),
                       ("gsm8k", r"; --shots 0 .or the task gsm8k_cot, whose examples come with it. needs no gsm8k")):
        with pytest.raises(UserError, match=said):
            documents(name, tmp_path)
        assert "--shots" not in missing(name, tmp_path, shots=0)
    assert "--shots" not in missing("gsm8k_cot", tmp_path) and "gsm8k_cot" in TASKS


PICTURE = {"chartqa": ("chartqa__test", "image", CHART | {"image": "a.png"}),
           "MolParse": ("molparse__test", "images", dict(images=["a.png"], question="Which?", answer="CCO")),
           "scienceqa": ("scienceqa__test", "image", dict(image="a.png", question="Which?", choices=["x", "y"], hint="",
                                                          answer=0, subject="s")),
           "mathvision_reason_test_reasoning": ("mathvision__test", "image", dict(
               id="1", question="Which?\n<image1>", options=[], answer="C", image="a.png", subject="s", level=1)),
           "mathverse_testmini_reasoning": ("mathverse__testmini", "image", dict(
               question="Find x.", answer="3", image="a.png", problem_version="Text Only"))}


@pytest.mark.parametrize("name", PICTURE)
def test_no_question_loses_its_picture_in_silence(tmp_path, name):
    """Another name of the column ends the task; an empty one is an error of the row, but where rows have text only."""
    file, field, row = PICTURE[name]
    assert documents(name, at(tmp_path, **{file: [row]}))[0]["images"] == [tmp_path / file.split("__")[0] / "a.png"]
    other = {("picture" if k == field else k): v for k, v in row.items()}
    with pytest.raises(UserError, match=f"KeyError: '{field}'.*its fields: .*picture"):
        documents(name, at(tmp_path, **{file: [other]}))
    doc, = documents(name, at(tmp_path, **{file: [row | {field: None}]}))
    if name in ("scienceqa", "mathverse_testmini_reasoning"):
        assert doc["error"] is None and doc["images"] == [] and "<image>" not in text(doc)
    else:
        assert "row 1: no picture: " in doc["error"]


def test_mmmu_names_an_empty_picture(tmp_path):
    row = dict(id="test_Art_1", question="Which of <image 2>?", options="['x', 'y']", answer="A", subject="Art",
               question_type="multiple-choice", image_1="a.png", image_2=None)
    doc, = documents("mmmu_val", at(tmp_path, mmmu__validation=[row]))
    assert "row 1: the question names image_2, which is empty" in doc["error"]


@pytest.mark.parametrize("name", PICTURE)
def test_rows_without_an_answer(tmp_path, name):
    file, field, row = PICTURE[name]
    for nothing in (None, ""):
        doc, = documents(name, at(tmp_path, **{file: [row | {"answer": nothing}]}))
        assert doc["gold"] is None and doc["error"] is None and doc["scorer"] == TASKS[name].scorer


def test_a_file_that_cannot_be_read_ends_its_task_only(tmp_path):
    """UserError is what a run of several tasks goes on from; it names the file and the row."""
    def broken(name, file, data, said, row=2, folder=tmp_path):
        path = folder / file
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)
        with pytest.raises(UserError, match=said) as e:
            documents(name, folder, shots=0)
        assert str(path) in str(e.value) and f"row {row} of" in str(e.value), e.value
    line = json.dumps(dict(question="1+1?", answer="#### 2")).encode()
    for bad, said in ((b'{"question": "cut', "not valid JSON"), (b'{"question": "\xff"}', "not UTF-8"),
                      (b"[1]", "object"), (b"", "empty")):
        broken("gsm8k", "gsm8k/test.jsonl", line + b"\n" + bad + b"\n" + line, said)
    broken("gsm8k", "gsm8k/test.jsonl.gz", b"no gzip", "BadGzipFile", 1, tmp_path / "gz")
    head = b"id,question,A,B,C,D,answer\n"
    broken("ceval", "ceval/val/law_val.csv", head + b"0,q,a,b,c,d,A\n1,\xff\xfe,a,b,c,d,A\n", "UnicodeDecodeError", 1)
    long = head + b"0,q,a,b,c,d,A\n1," + b"x" * 200_000 + b",a,b,c,d,A\n"
    broken("ceval", "ceval/val/law_val.csv", long, "field larger")
    broken("ProteinLMBench", "proteinlmbench/a.json", b"[3]", "no object", 1)
    broken("ProteinLMBench", "proteinlmbench/a.json", b'{"rows": []}', "KeyError: 'examples'", 1)
    pq.write_table(pa.Table.from_pylist([CHART] * 2000), tmp_path / "whole.parquet", compression="NONE")
    data = bytearray((tmp_path / "whole.parquet").read_bytes())
    data[4:60] = b"\xff" * 56  # the first page's header; the footer is whole
    broken("chartqa", "chartqa/test.parquet", bytes(data), "cannot be read", 1)


def test_an_id_that_comes_twice(tmp_path):
    row = dict(problem="p", subject="s", answer="3", unique_id="u1")
    with pytest.raises(UserError, match="math500: .*test-2.jsonl: the id u1 was already used, in .*test-1.jsonl"):
        documents("math500", at(tmp_path, **{"math500__test-1": [row], "math500__test-2": [row]}))


# ---- defects of the released evaluation that the table must not have -----------------------------------------------
def test_defect_2_names():
    """Script, yaml and README name the same benchmarks differently."""
    assert expand(["Molparse", "superchem_en", "mathvision"]) == ["MolParse", "superchem",
                                                                  "mathvision_reason_testmini_reasoning"]
    assert expand(["mmmu_pro"]) == ["mmmu_pro_standard", "mmmu_pro_vision"]
    assert expand(["math", "mathverse_testmini_reasoning"]) == list(GROUPS["math"].members)
    with pytest.raises(AssertionError, match="no task or group 'mmlu2'"):
        expand(["mmlu2"])


def test_defect_3_no_placeholder_paths():
    for name, task in TASKS.items():
        assert "DATASET_PATH" not in task.files + task.hub and not task.files.startswith("/")
        assert "/" in task.hub or name in ("toy", "cluewsc", "chemistry"), f"{name}: {task.hub}"


def test_defect_10_superchem_pictures_in_their_places(root):
    doc = documents("superchem", root)[0]
    assert doc["images"] == [picture(1), picture(2), picture(3)]  # question, question, option A
    assert [text(doc).index("<image>") < text(doc).index(word) for word in ("and", "Which", "two")] == [True] * 3
    assert TASKS["superchem"].temperature == TASKS["superchem_cn"].temperature == 0 and TASKS["superchem"].samples == 1


def test_defect_13_no_stop_strings_in_chat(root):
    for name in CHAT:
        assert TASKS[name].stop == ()
    assert "Q" not in TASKS["bbh"].stop and "Q:" in TASKS["bbh"].stop


def test_defect_14_one_scale():
    """Fractions everywhere; only the published tables are in percent."""
    assert {t.aggregate for t in TASKS.values()} <= {"mean", "group_mean", "micro_macro", "all_in_group",
                                                      "wemath", "rmse", "avg@k"}
    for table in (tasks.VL, tasks.TEXT, tasks.SCIENCE, tasks.REASON):
        values = [v for row in published(table)[1].values() for v in row]
        assert 1 < max(values) <= 100 and min(values) >= 0


# ---- groups and published numbers -----------------------------------------------------------------------------------
def test_names_and_counts():
    assert [len(GROUPS[g].members) for g in ("general", "math", "science")] == [17, 5, 15]
    assert [len(expand([g])) for g in ("SmolInstruct", "sciassess", "scientific")] == [14, 24, 30]
    assert len(GROUPS["text"].members) == 15 and len(GROUPS["reasoning"].members) == 9
    assert len(prompts.CEVAL) == 52 and len(prompts.CMMLU) == 67
    named = set("mmlu bbh arc_easy arc_challenge hellaswag winogrande nq_open agieval triviaqa gpqa gsm8k cmath "
                "cluewsc ceval cmmlu mmlu_pro aime24 amc23 math500 olympiadbench minerva_math physics chemistry "
                "mol2caption caption2mol sfe-en sfe-zh superchem superchem_cn SmolInstruct".split())
    assert named <= {*TASKS, *GROUPS}
    assert not set(TASKS) & set(GROUPS)
    assert TASKS["aime24"].samples == TASKS["amc23"].samples == 32 and TASKS["aime24"].aggregate == "avg@k"


@pytest.mark.parametrize("table", [tasks.VL, tasks.TEXT, tasks.SCIENCE, tasks.REASON])
def test_our_averages_of_published_numbers_are_the_published_averages(table):
    models, rows = published(table)
    groups = [g for g in rows if g in GROUPS and GROUPS[g].table == table]
    assert groups
    for k in range(len(models)):
        scores = {name: row[k] for name, row in rows.items() if name not in groups}
        for g in groups:
            assert tasks.average(g, scores) == pytest.approx(rows[g][k], abs=0.055), (g,
            models[k])  # 36.653 is printed 36.6
            some = dict(list(scores.items())[:-1])
            assert tasks.average(g, some) is None or list(scores)[-1] not in GROUPS[g].members


def test_published_wins():
    """Innovator's 21 of 30 counts ties; the others' 4 and 5 do not."""
    models, rows = published(tasks.SCIENCE)
    rows = {name: row for name, row in rows.items() if name in TASKS}
    assert models[-1] == "Innovator" and len(rows) == 30
    assert tasks.wins({n: r[2] for n, r in rows.items()}, {n: r[:2] for n, r in rows.items()}) == 21


def test_average_by_size():
    scores = {"agieval_choice": 0.5, "agieval_gaokao-mathcloze": 0.0, "agieval_math": 1.0}
    sizes = {"agieval_choice": 98, "agieval_gaokao-mathcloze": 1, "agieval_math": 1}
    assert tasks.average("agieval", scores, sizes) == pytest.approx(0.5)


def test_find_takes_a_split_and_not_its_neighbour(root):
    assert [p.name for p in formats.find(root, "mathvision/test")] == ["test-00000-of-00001.parquet"]
    assert [p.name for p in formats.find(root, "mathvision/testmini")] == ["testmini.jsonl"]
