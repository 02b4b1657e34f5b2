"""The recipe of whole runs of a tiny model: model and prompts are to be filled in."""

RECIPE = """
name = "tiny"
algorithm = "sppo"
iterations = 2
[model]
path = "{model}"
[prompts]
source = "{prompts}"
train = 32
heldout = 16
[generate]
engine = "transformers"
k = 4
max_new_tokens = 10
chunk = 8
[judge]
name = "letter_judge:make"
chunk = 8
[train]
beta = 1e-2
lr = 3e-3
schedule = "constant"
warmup = 0.0
batch = 4
micro_batch = 4
save_every = 2
epochs = 2
[momentum]
alpha = 0.3
[launch]
inline = ["model", "generate", "judge", "reference", "train", "extrapolate", "evaluate"]
"""
