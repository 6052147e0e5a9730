"""The phrase bank of the generated corpus: words, sentence templates and the quality factors they realise."""

from __future__ import annotations

# The five lists of a title have sixteen words each: an odd step through 2**20 titles repeats none.
ADJECTIVES = (
    "sparse", "robust", "fast", "deep", "adaptive", "local", "global", "causal", "modular", "stable", "shared",
    "recurrent", "layered", "linear", "discrete", "guided",
)  # fmt: skip
METHODS = (
    "attention", "sampling", "pruning", "distillation", "clustering", "routing", "smoothing", "alignment", "search",
    "encoding", "pooling", "mixing", "hashing", "editing", "tuning", "replay",
)  # fmt: skip
TOPICS = (
    "translation", "retrieval", "segmentation", "planning", "forecasting", "parsing", "detection", "tracking",
    "generation", "ranking", "compression", "labelling", "navigation", "recognition", "matching", "diagnosis",
)  # fmt: skip
DATA = (
    "images", "graphs", "videos", "songs", "maps", "proteins", "molecules", "tables", "documents", "robots",
    "sensors", "games", "streets", "records", "poems", "signals",
)  # fmt: skip
PARTS = (
    "masks", "priors", "gates", "rewards", "kernels", "trees", "queues", "caches", "anchors", "prompts", "filters",
    "codes", "hints", "tags", "buffers", "mirrors",
)  # fmt: skip
BENCHMARKS = ("Basalt", "Meridian", "Juniper", "Corvid", "Saffron", "Tundra", "Marlin", "Obsidian")
BASELINES = ("Harrow", "Quill", "Sextant", "Tarn", "Bramble", "Lantern", "Osprey", "Pewter")

TITLE_SLOTS = {"adjective": ADJECTIVES, "method": METHODS, "topic": TOPICS, "data": DATA, "part": PARTS}
TITLE = "%(adjective)s %(method)s for %(topic)s of %(data)s with %(part)s"
GAINS = ("1", "2", "4", "7", "9")  # points over the baseline, the paper's merit showing through
SEEDS = ("one seed", "three seeds", "ten seeds")
CODE_STATES = ("missing", "public")
SLOTS = (*TITLE_SLOTS, "bench", "base", "other", "gain", "seeds", "code", "number")

# drawn.py finds the gain by the words around it in these sentences.
ABSTRACTS = (
    "We propose %(adjective)s %(method)s for %(topic)s of %(data)s. "
    "It uses %(part)s and beats %(base)s by %(gain)s points on %(bench)s.",
    "We study %(topic)s of %(data)s and train %(adjective)s %(method)s with %(part)s. "
    "It gains %(gain)s points over %(base)s on %(bench)s.",
)  # fmt: skip
TEXTS = (
    "Section 2 defines %(method)s and %(part)s. "
    "Table 1 gives results on %(bench)s with %(seeds)s. The code is %(code)s.",
    "Section 1 explains %(part)s. "
    "Figure 2 shows %(data)s from %(bench)s. We train with %(seeds)s. The code is %(code)s.",
)  # fmt: skip

OPENINGS = ("I read this paper about %(topic)s.", "Here is my view of this paper.", "This paper is about %(method)s.")
VERDICTS = (  # lowest rating, sentence; from the highest down
    (8, "My vote is a strong accept."),
    (6, "My vote is to accept."),
    (5, "My vote is on the fence."),
    (3, "My vote is to reject."),
    (1, "My vote is a strong reject."),
)

# In the order in which a review brings them.
FACTORS = {
    "summary": (
        "The paper proposes %(adjective)s %(method)s for %(topic)s of %(data)s.",
        "The main contribution is %(adjective)s %(method)s with %(part)s.",
        "The authors introduce %(method)s with %(part)s for %(topic)s.",
    ),
    "strengths": (
        "A strength is the gain of %(gain)s points on %(bench)s.",
        "The main strength is the use of %(part)s.",
        "The strengths are the simple %(part)s and the results on %(bench)s.",
    ),
    "location": (
        "Table %(number)s does not support the claim about %(bench)s.",
        "Figure %(number)s shows that %(method)s fails on some %(data)s.",
        "Section %(number)s does not say how %(part)s are chosen.",
    ),
    "baseline": (
        "The experiments lack a comparison with %(other)s on %(bench)s.",
        "A strong baseline such as %(other)s is missing.",
        "The only baseline is %(base)s, so please compare with %(other)s.",
    ),
    "statistics": (
        "The gain over %(base)s may not be statistically significant with %(seeds)s.",
        "There are no error bars on %(bench)s.",
        "The standard deviation over %(seeds)s is not reported.",
    ),
    "limitations": (
        "The limitations of %(method)s on large %(data)s are not discussed.",
        "One limitation is the cost of %(part)s.",
        "The paper does not discuss the limitations of %(part)s.",
    ),
    "reproducibility": (
        "The code is %(code)s, which matters for reproducibility.",
        "To reproduce %(bench)s one needs the hyperparameters.",
        "With %(code)s code the results are easy or hard to reproduce.",
    ),
    "related_work": (
        "The related work on %(topic)s is incomplete.",
        "Prior work on %(method)s for %(data)s should be cited.",
        "Recent related work such as %(other)s is not cited.",
    ),
    "clarity": (
        "The writing is clear and the paper is well organized.",
        "The notation for %(part)s is hard to follow.",
        "The presentation of %(method)s is clear and easy to follow.",
    ),
    "question": (
        "Could the authors explain why %(part)s help on %(data)s?",
        "How does %(method)s behave when %(data)s are noisy?",
        "What happens on %(bench)s without %(part)s?",
    ),
    "suggestion": (
        "I suggest an ablation without %(part)s.",
        "I suggest adding a study of %(method)s on more %(data)s.",
        "The paper could be improved by adding more %(data)s.",
    ),
    "courtesy": (
        "I thank the authors for their careful work on %(topic)s.",
        "I hope these comments help the authors.",
        "I appreciate the effort spent on %(bench)s.",
    ),
}
# A reviewer of care c brings a factor with probability c ** rarity.
RARITY = {
    "summary": 0.5, "strengths": 0.7, "location": 1.1, "baseline": 1.0, "statistics": 1.6, "limitations": 1.3,
    "reproducibility": 1.4, "related_work": 1.1, "clarity": 0.8, "question": 0.9, "suggestion": 1.0, "courtesy": 1.2,
}  # fmt: skip
# At least as many as generated.py's _MAX_SENTENCES, as a review draws them without repeating.
VAGUE = (
    "It is an interesting area these days.",
    "I am not sure what to think of it.",
    "Some of it is good and some of it is bad.",
    "I have seen many papers like this one.",
    "It did not surprise me much.",
    "The whole thing is fine, I guess.",
    "People in the field may want to look at it.",
    "I am not fully convinced by all of it.",
    "There is a lot going on here.",
    "It reads like other papers of this kind.",
    "Many people now work on %(topic)s.",
    "I know a little about %(data)s.",
    "It took me some time to get through it.",
    "Overall it is about what one would expect.",
)
