"""Wording of the benchmarks, as published. {name} is a field that tasks.py or formats.py fills in.

Sources: the lmms-eval fork of Innovator-VL, lm-evaluation-harness 0.4.13, OlympicArena, Qwen2.5-Math, OpenCompass;
PROPERTY, MOL2CAPTION and CAPTION2MOL: the appendix of Innovator, with our line breaks."""
from data import THINK_PROMPT

# ---- vision and language ---------------------------------------------------------------------------------------------
DIRECT = "Answer with the option's letter from the given choices directly."
WORD = "Answer the question using a single word or phrase."
OPTIONS = "{images}{question}\n{options}\n" + DIRECT
THINK = THINK_PROMPT + "\n{images}"
PRO_VISION = (
    "Answer with the option letter from the given choices directly. The last line of your response should be of the "
    "following format: 'Answer: $LETTER' (without quotes) where LETTER is one of options.")
REALWORLD = (
    "Select the best answer to the above multiple-choice question based on the image. Respond with only the letter "
    "(A, B, C, D, or E) of the correct option.\nThe best answer is: ")
MMMU_DOMAINS = {
    "Art and Design": "Art Art_Theory Design Music",
    "Business": "Accounting Economics Finance Manage Marketing",
    "Science": "Biology Chemistry Geography Math Physics",
    "Health and Medicine": "Basic_Medical_Science Clinical_Medicine Diagnostics_and_Laboratory_Medicine Pharmacy "
                           "Public_Health",
    "Humanities and Social Science": "History Literature Psychology Sociology",
    "Tech and Engineering": "Agriculture Architecture_and_Engineering Computer_Science Electronics Energy_and_Power "
                            "Materials Mechanical_Engineering"}
REALWORLD_CN = "根据图像选择上述多项选择题的最佳答案。只需回答正确选项的字母（A, B, C, D 或 E）。\n最佳答案为： "
XLRS = (
    "\nSelect the best answer for the multiple-choice question based on the image. Only respond with the letter "
    "corresponding to the correct answer (A, B, C, D).\nThe answer is:")
XLRS_SEVERAL = (
    "\nSelect the best answer(s) for the multiple-choice question based on the image. There may be more than one "
    "correct option. Only respond with the letter(s) corresponding to the correct answer(s) (A, B, C, D), with "
    "multiple choices separated by spaces.The answer(s) is(are):")
RXN = (
    "{images}Question: {question}\nChoices:\n{options}\nBased on the image and the question, choose the most "
    "appropriate answer.\n**Only output a single letter (A, B, C, or D)**. Do NOT output any other text or "
    "explanation.")
RXN_ZH = "{images}问题: {question}\n选项:\n{options}\n请根据图像和问题，从以上四个选项中选择最合适的答案。\n只输出单个字母 (A, B, C 或 D)，不要输出选项内容，也不要输出任何解释。"
SUPERCHEM = (
    "Question:\n\n{question}\n\n{options}\n\nSelect the best answer to the above multiple-choice question based on "
    "the image. Respond with only the letter of the correct option.")
SUPERCHEM_CN = "问题:\n\n{question}\n\n{options}\n\n根据图像选择上述单选题的最佳答案。请仅输出正确选项的字母。"
MICRO = (
    "{images}The following is a multiple choice question (with answers). \nThink step by step and then output the "
    "answer in the format of \"The answer is (X)\" at the end, where X is the correct letter choice.\n\n{question}\n\n"
    "Options:\n{options}\n\n")
PROTEIN = (
    "Answer the multiple-choice question based solely on the provided context. \nIf you are still unsure about the "
    "answer, output option 7.\nSelect only ONE correct option by its number. Start your response with 'The correct "
    "option is' followed by the option number ONLY. eg: \"The correct option is Option X.\"\n\n Question: \n"
    "{question}\n Options: \n{listed}\n\nThe correct option is:")
MSEARTH = (
    "{images}\nYou are tasked with answering a multiple-choice question about the given input image.\n\n{query}\n\n"
    "Based on the image, select the correct option (e.g., 'A', 'B', 'C') or directly state the correct option "
    "content.\n\nThe output must be written in **JSON format** using the structure below:\n```json\n{{\n    "
    "\"answer\": \"Correct option or short answer\",\n    \"Explanation\": \"Reasoning explaining how to derive the "
    "correct answer.\" \n}}\n```\n")
SFE = {
    "mcq": "The question is a multiple-choice question. Answer with the option letter from the given choices.",
    "exact_match": "The question is an exact match question. Answer the question using a single word or phrase.",
    "open_ended": "The question is an open-ended question. Answer the question using a phrase.",
}
HINTS = {  # MathVista: by question type, or by answer type and precision
    "multi_choice": "Please answer the question and provide the correct option letter, e.g., A, B, C, D, at the end.",
    "integer":
        "Please answer the question requiring an integer answer and provide the final value, e.g., 1, 2, 3, at the "
        "end.",
    "float 1":
        "Please answer the question requiring a floating-point number with one decimal place and provide the final "
        "value, e.g., 1.2, 1.3, 1.4, at the end.",
    "float 2":
        "Please answer the question requiring a floating-point number with two decimal places and provide the final "
        "value, e.g., 1.23, 1.34, 1.45, at the end.",
    "list":
        "Please answer the question requiring a Python list as an answer and provide the final list, e.g., [1, 2, 3], "
        "[1.2, 1.3, 1.4], at the end.",
}
SMOL = {  # SMolInstruct, in front of each question
    "forward_synthesis": "Predict the major product(s) for these reactants. Output the product(s) in SMILES format.",
    "retrosynthesis":
        "Suggest the starting materials (reactants) for the given product. If multiple reactants are needed, separate "
        "them with a period (.). Output only the SMILES strings.",
    "molecule_captioning": "Describe the following molecule's structure and chemical classification in detail:",
    "molecule_generation": "Generate the SMILES string for a molecule that fits this description:",
    "name_conversion-i2f":
        "Determine the molecular formula of this IUPAC name. Output only the molecular formula, without any "
        "explanation or extra text.",
    "name_conversion-i2s":
        "Convert this IUPAC name to its SMILES structure. Output only the SMILES string, without any explanation or "
        "extra text.",
    "name_conversion-s2f":
        "Determine the molecular formula of this SMILES string. Output only the molecular formula, without any "
        "explanation or extra text.",
    "name_conversion-s2i":
        "Convert this SMILES structure to its IUPAC name. Output only the IUPAC name, without any explanation or "
        "extra text.",
    "property_prediction-esol":
        "As a specialized chemist, calculate the logSol (aqueous solubility) for the molecule below. Consider the "
        "molecular weight, number of rotatable bonds, and aromatic proportion. Provide the final logSol value as a "
        "floating point number. Output: [value]",
    "property_prediction-lipo":
        "Analyze the lipophilicity (logP) of this molecular structure. Focus on the hydrophobic and hydrophilic "
        "balance. Provide the numerical logP value only. Output: [value]",
    "property_prediction-bbbp":
        "Does this molecule penetrate the Blood-Brain Barrier (BBBP)? Answer strictly with 'Yes' or 'No'.",
    "property_prediction-clintox":
        "Predict the clinical toxicity of this molecule. Answer strictly with 'Yes' or 'No'.",
    "property_prediction-hiv":
        "Analyze the SMILES string and predict its HIV activity. Answer strictly with 'Yes' or 'No'.",
    "property_prediction-sider": "Does this drug cause the specific side effect? Answer strictly with 'Yes' or 'No'.",
}

# ---- text ------------------------------------------------------------------------------------------------------------
BOXED = "Please reason step by step, and put your final answer within \\boxed{}."
ARENA = "You are a highly skilled student proficient in solving scientific problems."
MCQ = "The following are multiple choice questions (with answers) about {}."
MMLU_PRO = MCQ + (
    " Think step by step and then finish your answer with \"the answer is (X)\" where X is the correct letter "
    "choice.\n")
GPQA = (
    "Here are some example questions from experts. Answer the final question yourself, following the format of the "
    "previous questions exactly.\n")
CLUEWSC = "{text}\n此处，“{span2_text}”是否指代“{span1_text}”？\nA. 是\nB. 否\n请从“A”，“B”中进行选择。\n答："
PROPERTY = (
    "Role: You are a top AI assistant specializing in molecular chemistry and drug discovery, proficient in molecular "
    "property prediction.\nTask: {question} Output \"True\" or \"False\".\nMolecule to analyze: {molecule}\nPlease "
    "reason step by step.")
PROPERTIES = {  # MoleculeNet's files: question (bace: the paper's, others in its form), columns of SMILES, answer
    "BBBP": ("Evaluate whether the specified molecule penetrates the blood-brain barrier.", "smiles", "BBBP"),
    "bace": ("BACE1 is an aspartic acid protease. Is this molecule effective in the experiment?", "mol", "Class"),
    "clintox": ("Evaluate whether the specified molecule failed clinical trials for toxicity.", "smiles", "CT_TOX"),
}
MOL2CAPTION = (
    "Role: You are a helpful assistant. You are a professional chemist.\nTask: Your task is to generate a natural, "
    "concise, and chemically accurate description of a molecule based on its SELFIES representation.\nExample "
    "(Molecular SELFIES): [C][C][Branch1][C][C][Branch2][Branch1][=Branch2][C][O][P][=Branch1][C][=O][Branch1][C][O]"
    "[O][P][=Branch1][C][=O][Branch1][C][O][O][C][C@H1][O][C@@H1][Branch1][P][N][C][=N][C][=C][Branch1][C][N][N][=C]"
    "[N][=C][Ring1][#Branch1][Ring1][#Branch2][C@H1][Branch1][C][O][C@@H1][Ring1][S][O][P][=Branch1][C][=O][Branch1]"
    "[C][O][O][C@@H1][Branch1][C][O][C][=Branch1][C][=O][N][C][C][C][=Branch1][C][=O][N][C][C][S][C][=Branch1][C][=O]"
    "[C][/C][=C][\\C][C][=O]\nExample (Answer): The molecule is a cis-3-enoyl-CoA and a monounsaturated fatty "
    "acyl-CoA. It derives from an adipoyl-CoA. It is a conjugate acid of a cis-3,4-didehydroadipoyl-CoA "
    "semialdehyde(4-)\nProblem: Now try this.\nMolecule SELFIES: {molecule}\nThink step by step.")
CAPTION2MOL = (
    "Role: You are a helpful assistant.\nTask: Please generate the molecular structure (SELFIES) based on the "
    "following description.\nExample (Description): The molecule is a benzoate ester obtained by the formal "
    "condensation of the carboxy group of 4-[(2,4-dihydroxy-6-propylbenzoyl)oxy]-2-hydroxy-6-propylbenzoic acid with "
    "the 4-hydroxy group of 2,4-dihydroxy-6-pentylbenzoic acid (olivetolic acid). It is isolated from the endophytic "
    "fungi Cytonaema and acts as an inhibitor of human cytomegalovirus (hCMV) protease. It has a role as a "
    "metabolite, an antiviral agent and a protease inhibitor. It is a benzoate ester, a member of resorcinols and a "
    "monohydroxybenzoic acid. It derives from an olivetolic acid.\nExample (Answer): [C][C][C][C][C][C][=C][C]"
    "[Branch2][Ring2][=C][O][C][=Branch1][C][=O][C][=C][Branch1][C][O][C][=C][Branch2][Ring1][#Branch1][O][C]"
    "[=Branch1][C][=O][C][=C][Branch1][C][O][C][=C][Branch1][C][O][C][=C][Ring1][Branch2][C][C][C][C][=C][Ring2]"
    "[Ring1][Branch1][C][C][C][=C][C][Branch1][C][O][=C][Ring2][Ring2][C][C][=Branch1][C][=O][O]\nProblem: Now try "
    "this.\nDescription: {description}\nPlease think step by step and return the final answer.")
GSM8K_COT = [  # Wei et al. 2022 (arXiv 2201.11903), the harness' gsm8k_cot
    "Q: There are 15 trees in the grove. Grove workers will plant trees in the grove today. After they are done, "
    "there will be 21 trees. How many trees did the grove workers plant today?\nA: There are 15 trees originally. "
    "Then there were 21 trees after some more were planted. So there must have been 21 - 15 = 6. The answer is 6.",
    "Q: If there are 3 cars in the parking lot and 2 more cars arrive, how many cars are in the parking lot?\nA: "
    "There are originally 3 cars. 2 more cars arrive. 3 + 2 = 5. The answer is 5.",
    "Q: Leah had 32 chocolates and her sister had 42. If they ate 35, how many pieces do they have left in total?\nA: "
    "Originally, Leah had 32 chocolates. Her sister had 42. So in total they had 32 + 42 = 74. After eating 35, they "
    "had 74 - 35 = 39. The answer is 39.",
    "Q: Jason had 20 lollipops. He gave Denny some lollipops. Now Jason has 12 lollipops. How many lollipops did "
    "Jason give to Denny?\nA: Jason started with 20 lollipops. Then he had 12 after giving some to Denny. So he gave "
    "Denny 20 - 12 = 8. The answer is 8.",
    "Q: Shawn has five toys. For Christmas, he got two toys each from his mom and dad. How many toys does he have "
    "now?\nA: Shawn started with 5 toys. If he got 2 toys each from his mom and dad, then that is 4 more toys. 5 + 4 "
    "= 9. The answer is 9.",
    "Q: There were nine computers in the server room. Five more computers were installed each day, from monday to "
    "thursday. How many computers are now in the server room?\nA: There were originally 9 computers. For each of 4 "
    "days, 5 more computers were added. So 5 * 4 = 20 computers were added. 9 + 20 is 29. The answer is 29.",
    "Q: Michael had 58 golf balls. On tuesday, he lost 23 golf balls. On wednesday, he lost 2 more. How many golf "
    "balls did he have at the end of wednesday?\nA: Michael started with 58 golf balls. After losing 23 on tuesday, "
    "he had 58 - 23 = 35. After losing 2 more, he had 35 - 2 = 33 golf balls. The answer is 33.",
    "Q: Olivia has $23. She bought five bagels for $3 each. How much money does she have left?\nA: Olivia had 23 "
    "dollars. 5 bagels for 3 dollars each will be 5 x 3 = 15 dollars. So she has 23 - 15 dollars left. 23 - 15 is 8. "
    "The answer is 8.",
]


def subjects(text: str) -> dict[str, str]:
    return dict(pair.split() for pair in text.split(","))


CEVAL = subjects(  # the harness' names
    "accountant 注册会计师,advanced_mathematics 高等数学,art_studies 艺术学,basic_medicine 基础医学,business_administration 工商管理,"
    "chinese_language_and_literature 中国语言文学,civil_servant 公务员,clinical_medicine 临床医学,college_chemistry 大学化学,"
    "college_economics 大学经济学,college_physics 大学物理,college_programming 大学编程,computer_architecture 计算机组成,"
    "computer_network 计算机网络,discrete_mathematics 离散数学,education_science 教育学,electrical_engineer 注册电气工程师,"
    "environmental_impact_assessment_engineer 环境影响评价工程师,fire_engineer 注册消防工程师,high_school_biology 高中生物,"
    "high_school_chemistry 高中化学,high_school_chinese 高中语文,high_school_geography 高中地理,high_school_history 高中历史,"
    "high_school_mathematics 高中数学,high_school_physics 高中物理,high_school_politics 高中政治,"
    "ideological_and_moral_cultivation 思想道德修养与法律基础,law 法学,legal_professional 法律职业资格,logic 逻辑学,"
    "mao_zedong_thought 毛泽东思想和中国特色社会主义理论体系概论,marxism 马克思主义基本原理,metrology_engineer 注册计量师,middle_school_biology 初中生物,"
    "middle_school_chemistry 初中化学,middle_school_geography 初中地理,middle_school_history 初中历史,"
    "middle_school_mathematics 初中数学,middle_school_physics 初中物理,middle_school_politics 初中政治,"
    "modern_chinese_history 近代史纲要,operating_system 操作系统,physician 医师资格,plant_protection 植物保护,"
    "probability_and_statistics 概率统计,professional_tour_guide 导游资格,sports_science 体育学,tax_accountant 税务师,"
    "teacher_qualification 教师资格,urban_and_rural_planner 注册城乡规划师,veterinary_medicine 兽医学")
CMMLU = subjects(  # the harness' names
    "agronomy 农学,anatomy 解剖学,ancient_chinese 古汉语,arts 艺术学,astronomy 天文学,business_ethics 商业伦理,"
    "chinese_civil_service_exam 中国公务员考试,chinese_driving_rule 中国驾驶规则,chinese_food_culture 中国饮食文化,"
    "chinese_foreign_policy 中国外交政策,chinese_history 中国历史,chinese_literature 中国文学,chinese_teacher_qualification 中国教师资格,"
    "clinical_knowledge 临床知识,college_actuarial_science 大学精算学,college_education 大学教育学,"
    "college_engineering_hydrology 大学工程水文学,college_law 大学法律,college_mathematics 大学数学,"
    "college_medical_statistics 大学医学统计,college_medicine 大学医学,computer_science 计算机科学,computer_security 计算机安全,"
    "conceptual_physics 概念物理学,construction_project_management 建设工程管理,economics 经济学,education 教育学,"
    "electrical_engineering 电气工程,elementary_chinese 小学语文,elementary_commonsense 小学常识,"
    "elementary_information_and_technology 小学信息技术,elementary_mathematics 初等数学,ethnology 民族学,food_science 食品科学,"
    "genetics 遗传学,global_facts 全球事实,high_school_biology 高中生物,high_school_chemistry 高中化学,high_school_geography 高中地理,"
    "high_school_mathematics 高中数学,high_school_physics 高中物理学,high_school_politics 高中政治,human_sexuality 人类性行为,"
    "international_law 国际法学,journalism 新闻学,jurisprudence 法理学,legal_and_moral_basis 法律与道德基础,logical 逻辑学,"
    "machine_learning 机器学习,management 管理学,marketing 市场营销,marxist_theory 马克思主义理论,modern_chinese 现代汉语,nutrition 营养学,"
    "philosophy 哲学,professional_accounting 专业会计,professional_law 专业法学,professional_medicine 专业医学,"
    "professional_psychology 专业心理学,public_relations 公共关系,security_study 安全研究,sociology 社会学,sports_science 体育学,"
    "traditional_chinese_medicine 中医中药,virology 病毒学,world_history 世界历史,world_religions 世界宗教")
