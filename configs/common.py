"""Defaults that every experiment starts from, and the reading of a config's argument."""

from ml_collections import ConfigDict

from configs.mesh_rules import WHOLE


def get_defaults() -> ConfigDict:
    """Returns the keys that every config has. An experiment adds `models`, `loss` and what else it needs."""
    config = ConfigDict()
    config.objective = ""  # a key of train.objectives
    config.seed = 0  # of initialization, data order and every random draw
    config.group = ""  # runs that differ in their seed alone share a group
    config.steps = 0  # updates
    config.batch_size = 0  # examples in an update, over all devices
    config.nonfinite = "stop"  # on a loss or gradient that is not finite; or "skip", which leaves that update out

    config.data = ConfigDict()
    config.data.dataset = ""  # TFDS name
    config.data.data_dir = ""  # where datasets are kept, also gs://BUCKET/NAME; "" for TFDS's default
    config.data.split = "train"
    config.data.validation_split = "validation"
    config.data.image_field = ""  # of pictures; "" for a usual name, see data.fields
    config.data.text_field = ""  # of captions; "" for a usual name
    config.data.image_size = 0  # pixels
    config.data.max_tiles = 1  # of image_size pixels that a picture of any shape is cut into; 1 for one square
    config.data.buckets = ()  # ((height, width), ...), of which each batch in training has one; () for squares
    config.data.transform = "center_square"  # a key of data.preprocess.TRANSFORMS
    config.data.text_length = 0  # tokens of a caption, ends included; 0 for no text
    config.data.text_ends = False  # frame captions by a start and an end token, as CLIP's are; Llama's as turns
    config.data.dialogues = ""  # texts are questions with answers: one of data.dialogues.SOURCES; "" for none
    config.data.tokenizer = ""  # a CLIP vocabulary, or a run's tokenizer.json; "" for the one stored with the dataset
    config.data.label_field = ""  # of class numbers; "" for none
    config.data.bpe_dropout = 0.0  # probability that a merge is passed over, in training
    config.data.draft = False  # decode large JPEGs at 1/2, 1/4 or 1/8 where that is enough: faster, and other pixels
    config.data.cache = False  # keep decoded records in memory, 4 GiB of them at most
    config.data.workers = 1  # that read
    config.data.processes = False  # workers are processes instead of threads: for pictures that take long to decode
    config.data.read_ahead = 4  # batches kept ready

    config.models = ConfigDict()  # {part: {name, fields of the network}}
    config.frozen = ConfigDict()  # {part: {name, fields..., source, part}}: networks that are used, not trained
    config.initialize = ConfigDict()  # {part: {source, part}}: where fine-tuning starts
    config.relearn = ()  # keys, such as "process.prediction", in which a source's process may differ from this run's
    config.trainable = (".*",)  # patterns of the paths that are trained; all other parameters stay as they start

    config.lora = ConfigDict()  # pairs of small matrices are trained beside kernels that stay as they are
    config.lora.rank = 0  # of each pair; 0 for none
    config.lora.alpha = 0.0  # their products count alpha / rank times; 0 for the rank, and so once
    config.lora.paths = (r"attention/(query|key_value|query_key_value|out)/kernel$",)  # of kernels that have one

    config.loss = ConfigDict()
    config.sample = ConfigDict()

    config.optimizer = ConfigDict()
    config.optimizer.transform = "adamw"  # or lion, sgd; or muon, of rules of kernels
    config.optimizer.b1 = 0.9
    config.optimizer.b2 = 0.999
    config.optimizer.eps = 1e-8
    config.optimizer.mu_dtype = (
        ""  # of the first moment: float32, or bfloat16 for half the memory; "" as the parameters
    )
    config.optimizer.weight_decay = 0.0
    config.optimizer.no_decay = r"(bias|scale|embedding)$"  # paths without weight decay
    config.optimizer.clip_norm = 0.0  # of a rule's gradients together; 0 for no clipping
    config.optimizer.schedule = ConfigDict()
    config.optimizer.schedule.name = "warmup_cosine"
    config.optimizer.schedule.peak = 1e-3
    config.optimizer.schedule.end = 0.0
    config.optimizer.schedule.warmup_steps = 0
    config.optimizer.schedule.decay_steps = 0  # length of the schedule; 0 for config.steps
    config.optimizer.schedule.boundaries = ()
    config.optimizer.schedule.factor = 0.5
    config.optimizer.rules = ({"pattern": ".*"},)  # ordered; each may override any key above
    config.optimizer.bounds = ()  # ((pattern, low, high), ...), enforced after each update

    config.ema = ConfigDict()
    config.ema.decay = 0.0  # 0 for no moving average
    config.ema.warm_up = True
    config.ema.every = 1  # steps
    config.ema.paths = ".*"
    config.ema.lengths = ()  # of power-function averages kept beside, such as (0.05, 0.1): see weights.power_averages

    config.mesh = ConfigDict()
    config.mesh.data = -1  # -1: all devices that are left
    config.mesh.fsdp = 1
    config.mesh.tensor = 1
    config.mesh.microbatches = 1  # parts of a batch that are taken through the networks in turn, to save memory
    config.mesh.rules = WHOLE  # ((path pattern, mesh axis of each leading dimension), ...)
    config.mesh.topology = ""  # the TPU slice that scripts.fit compiles for, such as v5e:4x4

    config.checkpoint = ConfigDict()
    config.checkpoint.every = 1000  # steps
    config.checkpoint.keep = 2

    config.evaluate = ConfigDict()
    config.evaluate.every = 1000  # steps
    config.evaluate.batches = 4  # of the validation split
    config.evaluate.previews = 8  # pictures

    config.log = ConfigDict()
    config.log.every = 50  # steps

    config.wandb = ConfigDict()
    config.wandb.mode = "offline"  # online, offline or disabled
    config.wandb.project = "tessera"
    config.wandb.entity = ""
    config.wandb.name = ""  # "" for the run folder's name
    return config


def muon_of(hidden: str) -> tuple[dict[str, str | float], ...]:
    """Returns rules of an optimizer: Muon for the kernels in whose paths `hidden` is found, the default for all else.

    Jordan et al. 2024 keep it to hidden layers too: first and last ones, embeddings, biases and scales have AdamW.
    """
    return {"pattern": hidden, "transform": "muon", "b1": 0.95}, {"pattern": ".*"}


def get_process(schedule: dict[str, str | int | float], latents: bool = False) -> ConfigDict:
    """Returns the `config.process` of a diffusion, with every key; see `diffusion.process.Process`.

    Args:
      schedule: {name, fields} of one in `diffusion.schedule`; the last step of a chain keeps data unless they say not.
      latents: whether it is of what a first stage makes, and brings to a deviation of 1.
    """
    chain = {"zero_terminal_snr": False} if schedule["name"] == "discrete" else {}
    return ConfigDict(
        {
            "schedule": {**chain, **schedule},
            "prediction": "eps",
            "variance": "small",  # of a chain's reverse steps
            "weighting": "uniform",
            "gamma": 5.0,  # of the other weightings
            "times": "uniform",  # how training draws t
            "time_shift": 0,  # 1 for networks that are fed steps from 1
            "sigma_data": 1.0 if latents else 0.5,  # of prediction edm; 0.5 is that of pixels (Karras et al. 2022)
            "clip": False,
        }
    )


def get_diffusion_sampling(sampler: str, steps: int, guidance: float = 1.0) -> ConfigDict:
    """Returns the `config.sample` of a diffusion: solver, and guidance, of which 1 means none."""
    return ConfigDict(
        {
            "sampler": sampler,  # one of diffusion.solver_choice.SOLVERS
            "steps": steps,
            "spacing": "",  # of the times; "" for the sampler's own
            "eta": 0.0,  # of ddim
            "churn": 0.0,  # of heun, in schedule edm: noise added between its times, with the next three
            "churn_min": 0.0,
            "churn_max": 0.0,  # 0 for no end
            "churn_noise": 1.0,
            "guided_channels": 0,  # the first ones of the data that are guided; 0 for all
            "times": "even",  # of a chain; or "published", as the code of Stable Diffusion has them
            "offset": 0,  # of a chain: added to times of spacing "leading"
            "end": "clean",  # of a chain: "first" lets ddim and plms end at the noise of its first step
            "guidance": guidance,
            "rescale": 0.0,  # of guided pictures to the spread of unguided ones, 0 to 1
            "guidance_start": 0.0,  # shares of the process between which there is guidance
            "guidance_stop": 1.0,
        }
    )


def make_debug(config: ConfigDict, *, steps: int, batch_size: int) -> None:
    """What every `debug` variant changes: seconds of work, saved and evaluated twice, on the embedded dataset.

    Its networks' sizes are the experiment's to choose.
    """
    config.steps = steps
    config.batch_size = batch_size
    config.data.dataset = "scenes/single32"
    config.data.image_size = 32
    config.data.workers = 1
    config.mesh.fsdp = 1
    if config.mesh.topology:
        config.mesh.topology = "v5e:2x2"
    config.optimizer.schedule.warmup_steps = min(config.optimizer.schedule.warmup_steps, 1)
    if config.optimizer.schedule.name == "warmup_cosine":
        config.optimizer.schedule.decay_steps = 100  # the same compiled update for any number of steps
    config.checkpoint.every = config.evaluate.every = steps // 2
    config.evaluate.batches = 1
    config.evaluate.previews = 2
    config.log.every = 1
    config.wandb.mode = "disabled"


def check_argument(argument: str, known: tuple[str, ...]) -> str:
    """Returns the argument of `--config=file.py:argument`, or the first known one if it is empty.

    Raises:
      ValueError: if it is none of `known`; lists them.
    """
    if argument and argument not in known:
        raise ValueError(f"unknown argument {argument!r}; choose one of {', '.join(known)}")
    return argument or known[0]
