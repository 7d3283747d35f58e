"""Runners of the golden cases about the process itself: schedules, posteriors, losses, samplers (kinds by name)."""

import functools

import jax
import jax.numpy as jnp
import numpy as np

from diffax.diffusion import guidance, losses, process, samplers, schedules, timesteps
from diffax.diffusion.schedules import NoiseLevel

BETAS = {
    "linear": schedules.linear_betas,
    "cosine": schedules.cosine_betas,
    "squaredcos_cap_v2": schedules.cosine_betas,
}
PREDICTS = {"eps": "eps", "x0": "x", "xprev": "previous_x"}


def nhwc(a):
    return jnp.asarray(np.moveaxis(a, -3, -1))


def nchw(a):
    return np.moveaxis(np.asarray(a), -1, -3)


def per_pixel_or_sample(a):
    """[B, 1, 1, 1] -> [B] for the fixed variances, which are one number per sample."""
    return a.reshape(-1) if a.size == a.shape[0] else nchw(a)


class Chain:
    """The diffusion that a case's config describes: its schedule, its respaced steps in increasing order of t."""

    def __init__(self, config):
        self.steps = config["steps"]
        if config["noise_schedule"] not in BETAS:
            raise NotImplementedError(f"noise_schedule {config['noise_schedule']}")
        self.betas = BETAS[config["noise_schedule"]](self.steps)
        sections = config.get("timestep_respacing", "")
        self.schedule = schedules.discrete(self.betas, rescale_time=config.get("rescale_timesteps", False))
        self.kept = schedules.space_timesteps(self.steps, sections)
        self.sampling = schedules.respaced(self.schedule, self.steps, sections)
        self.table = self.sampling[::-1]
        self.predicts = PREDICTS[config.get("model_mean_type", "eps")]
        self.variance = config.get("model_var_type", "fixed_small")

    def at(self, t):
        return jax.tree.map(jnp.asarray, self.table[np.asarray(t)])

    def above(self, t):
        """The next noisier level; pure noise above the last."""
        noisier = np.append(self.table.t.logsnr[1:], -np.inf).astype(np.float32)
        return NoiseLevel(time=jnp.zeros(len(t)), logsnr=jnp.asarray(noisier[np.asarray(t)]))

    def denoiser(self, network, clip):
        def denoise(z, step, **cond):
            out = network(z, step.t.time)
            return process.predict(out, z, step, predicts=self.predicts, variance=self.variance)

        return guidance.guided(denoise, [guidance.clip_denoised()] if clip else [])

    def analytic(self, z, time):
        t = process.expand(time, z)
        out = {"eps": lambda: z * t / (t + 1), "x": lambda: z / (1 + t / 300)}[self.predicts]()
        values = {"learned_range": lambda: jnp.cos(3 * z), "learned": lambda: -6 + jnp.cos(3 * z)}
        return jnp.concatenate([out, values[self.variance]()], -1) if self.variance in values else out


def analytic_log_prob(inputs):
    """log p(y | z) whose gradient is the analytic cond_fn of the golden README."""

    def log_prob(z, t, **cond):
        means = jnp.asarray(inputs["class_means"])[jnp.asarray(inputs["y"])]
        distance = (process.expand(means, z) - z) ** 2
        return -0.5 * jnp.sum(distance.reshape(len(z), -1), axis=1) / (1 + t.time / 500)

    return log_prob


def schedule(meta, inputs, params):
    got = {}
    for name in meta["config"]["schedules"]:
        for steps in meta["config"]["T"]:
            if name not in BETAS:
                raise NotImplementedError(f"noise_schedule {name}")
            betas = BETAS[name](steps)
            noise = schedules.discrete(betas)
            u = np.arange(steps, 0, -1) / steps
            table = schedules.transitions(noise, u, dtype=np.float64)[::-1]
            ab, ab_prev = (1 / (1 + np.exp(-level.logsnr)) for level in (table.t, table.s))
            beta = np.exp(table.max_logvar)
            arrays = {
                "betas": betas,
                "alphas_cumprod": ab,
                "alphas_cumprod_prev": ab_prev,
                "alphas_cumprod_next": np.append(ab[1:], 0.0),
                "sqrt_alphas_cumprod": np.sqrt(ab),
                "sqrt_one_minus_alphas_cumprod": np.sqrt(1 - ab),
                "log_one_minus_alphas_cumprod": -np.logaddexp(0, table.t.logsnr),
                "sqrt_recip_alphas_cumprod": ab**-0.5,
                "sqrt_recipm1_alphas_cumprod": np.exp(-table.t.logsnr / 2),
                "posterior_variance": beta * (1 - ab_prev) / (1 - ab),
                "posterior_log_variance_clipped": table.min_logvar,
                "posterior_mean_coef1": beta * np.sqrt(ab_prev) / (1 - ab),
                "posterior_mean_coef2": (1 - ab_prev) * np.sqrt(ab / ab_prev) / (1 - ab),
            }
            index = inputs[f"index.{steps}"]
            for key, a in arrays.items():
                got[f"{name}.{steps}.{key}"] = a[index]
                got[f"{name}.{steps}.{key}.sum"] = a.sum()
    return got


def respacing(meta, inputs, params):
    got = {}
    for i, config in enumerate(meta["config"]["cases"]):
        chain = Chain(config | {"timestep_respacing": config["sections"]})
        table = schedules.transitions(chain.schedule, (chain.kept[::-1] + 1) / chain.steps, dtype=np.float64)[::-1]
        betas = np.exp(table.max_logvar)
        got |= {
            f"{i}.timestep_map": chain.kept,
            f"{i}.betas": betas,
            f"{i}.alphas_cumprod": np.cumprod(1 - betas),
            f"{i}.posterior_variance": betas
            * np.exp(np.logaddexp(0, table.t.logsnr) - np.logaddexp(0, table.s.logsnr)),
            f"{i}.posterior_log_variance_clipped": table.min_logvar,
        }
    for refused in meta["config"].get("errors", []):
        try:
            schedules.space_timesteps(refused["steps"], refused["sections"])
        except ValueError:
            continue
        raise AssertionError(f"{refused} must be refused")
    return got


def q(meta, inputs, params):
    x, eps, t = nhwc(inputs["x_start"]), nhwc(inputs["noise"]), inputs["t"]
    got = {}
    for i, config in enumerate(meta["config"]["diffusions"]):
        chain = Chain(config)
        step = chain.at(t)
        z = process.diffuse(x, step.t, eps)
        posterior = process.posterior(x, z, step)
        end = jax.tree.map(lambda a: a[-1], chain.table.t)
        got |= {
            f"{i}.q_mean": nchw(process.diffuse(x, step.t, jnp.zeros_like(x))),
            f"{i}.q_variance": step.t.sigma**2,
            f"{i}.q_log_variance": 2 * jnp.log(step.t.sigma),
            f"{i}.x_t": nchw(z),
            f"{i}.posterior_mean": nchw(posterior.mean),
            f"{i}.posterior_variance": jnp.exp(step.max_logvar) * (step.s.sigma / step.t.sigma) ** 2,
            f"{i}.posterior_log_variance": posterior.logvar.reshape(-1),
            f"{i}.prior_bpd": losses.prior_bpd(x, jax.tree.map(jnp.asarray, end)),
            f"{i}.eps_from_xstart": nchw(process.eps_from_x(x, z, step.t)),
        }
    return got


def step(meta, inputs, params):
    chain = Chain(meta["config"])
    x, eps, z = (nhwc(inputs[k]) for k in ("x_start", "noise", "x_t"))
    out, drawn, t = nhwc(inputs["model_output"]), nhwc(inputs["sample_noise"]), inputs["t"]
    at = chain.at(t)
    got = {}
    for clip in (0, 1):
        denoise = chain.denoiser(lambda z, time: out, clip)
        p = denoise(z, at)
        mean, logvar = process.reverse(p, z, at)
        got |= {
            f"p_mean_variance.clip{clip}.mean": nchw(mean),
            f"p_mean_variance.clip{clip}.pred_xstart": nchw(p.x),
            "p_mean_variance.variance": per_pixel_or_sample(p.variance),
            "p_mean_variance.log_variance": per_pixel_or_sample(logvar),
            f"p_sample.clip{clip}.sample": nchw(samplers.ddpm().step(denoise, z, at, drawn, ())[0]),
            f"ddim_reverse_sample.clip{clip}.sample": nchw(samplers.climb_step(denoise, z, at, chain.above(t))),
            f"vb_terms_bpd.clip{clip}": losses.vlb_term(p, losses.Noised(x, eps, z, at)),
        }
        for eta in (0.0, 0.5, 0.7, 1.0):
            moved = samplers.ddim(eta).step(denoise, z, at, drawn, ())[0]
            got[f"ddim_sample.clip{clip}.eta{eta}.sample"] = nchw(moved)
    halved = guidance.guided(
        chain.denoiser(lambda z, time: out, False),
        [guidance.edit_x(lambda x: x / 2), guidance.clip_denoised()],
    )
    got["p_mean_variance.denoised_fn_half.pred_xstart"] = nchw(halved(z, at).x)

    # training_losses noises x_start with `noise`, whatever x_t is
    batch = losses.noised(x, eps, at)
    count = len(chain.kept)
    learned = chain.variance in ("learned", "learned_range")
    kinds = {
        "mse": losses.hybrid(1.0) if learned else losses.simple(),
        "rescaled_mse": losses.hybrid(count / 1000) if learned else losses.simple(),
        "kl": losses.vlb(1.0),
        "rescaled_kl": losses.vlb(count),
    }
    for kind, loss in kinds.items():
        value, terms = loss(out, batch, predicts=chain.predicts, variance=chain.variance)
        got[f"training_losses.{kind}.loss"] = value
        got |= {f"training_losses.{kind}.{name}": term for name, term in terms.items()}
        if kind == "rescaled_mse" and learned:  # the published code reports the term already rescaled
            got["training_losses.rescaled_mse.vb"] = terms["vb"] * count / 1000
    return got


def bpd_loop(meta, inputs, params):
    config = meta["config"]
    chain = Chain(config)
    draws = nhwc(inputs["noise"])
    denoise = chain.denoiser(chain.analytic, config["clip_denoised"])
    bpd = jax.jit(lambda x: losses.bits_per_dim(denoise, x, lambda i: draws[i], chain.sampling))(
        nhwc(inputs["x_start"])
    )
    return {
        "total_bpd": bpd.total,
        "prior_bpd": bpd.prior,
        "vb": bpd.terms,
        "xstart_mse": bpd.x_mse,
        "mse": bpd.eps_mse,
    }


def guided_steps(meta, inputs, params):
    config = meta["config"]
    chain = Chain(config)
    z, t, drawn = nhwc(inputs["x_t"]), inputs["t"], nhwc(inputs["sample_noise"])
    at = chain.at(t)
    plain = chain.denoiser(chain.analytic, True)
    steered = guidance.classifier(analytic_log_prob(inputs), config["cond_scale"])(plain)
    p = plain(z, at)
    mean = process.reverse(p, z, at).mean
    variance = jnp.broadcast_to(p.variance, mean.shape)
    scored = guidance.apply_score(steered(z, at), z, at.t)
    got = {
        "model_timesteps": at.t.time,
        "mean": nchw(mean),
        "variance": nchw(variance),
        "pred_xstart": nchw(p.x),
        "condition_mean": nchw(mean + variance * steered(z, at).score),
        "condition_score.mean": nchw(process.reverse(scored, z, at).mean),
        "condition_score.pred_xstart": nchw(scored.x),
        "p_sample": nchw(samplers.ddpm().step(steered, z, at, drawn, ())[0]),
    }
    for eta in (0.0, 0.5, 0.7, 1.0):
        got[f"ddim_sample.eta{eta}"] = nchw(samplers.ddim(eta).step(steered, z, at, drawn, ())[0])
    return got


def sample_loop(meta, inputs, params):
    config = meta["config"]
    chain = Chain(config)
    draws = nhwc(inputs["noise"])
    plain = chain.denoiser(chain.analytic, config["clip_denoised"])
    steered = guidance.classifier(analytic_log_prob(inputs), config["cond_scale"])(plain)

    def run(denoise, sampler):
        walk = functools.partial(samplers.sample, denoise, noise=lambda i: draws[i], steps=chain.sampling)
        return nchw(jax.jit(lambda z: walk(z, sampler=sampler))(nhwc(inputs["x_T"])))

    got = {
        "p_sample_loop": run(plain, samplers.ddpm()),
        "p_sample_loop.guided": run(steered, samplers.ddpm()),
    }
    for eta in (0.0, 0.5, 1.0):
        got[f"ddim_sample_loop.eta{eta}"] = run(plain, samplers.ddim(eta))
        got[f"ddim_sample_loop.guided.eta{eta}"] = run(steered, samplers.ddim(eta))
    # `invert` ends at the noisiest level; the published loop goes one step further, to pure noise
    x = nhwc(inputs["x_start"])
    noisy = jax.jit(lambda x: samplers.invert(plain, x, chain.sampling))(x)
    last = np.full(len(x), len(chain.kept) - 1)
    got["ddim_reverse_loop"] = nchw(samplers.climb_step(plain, noisy, chain.at(last), chain.above(last)))
    return got


def loss_terms(meta, inputs, params):
    a = {k: jnp.asarray(v) for k, v in inputs.items()}
    first = process.Gaussian(a["mean1"], a["logvar1"])
    unit = process.Gaussian(jnp.zeros_like(a["mean1"]), jnp.zeros_like(a["mean1"]))
    pixels = process.Gaussian(a["means"], 2 * a["log_scales"])
    return {
        "normal_kl": losses.normal_kl(first, process.Gaussian(a["mean2"], a["logvar2"])),
        "normal_kl_standard": losses.normal_kl(first, unit),
        "approx_standard_normal_cdf": losses.approx_standard_normal_cdf(a["cdf_x"]),
        "discretized_gaussian_log_likelihood": losses.discretized_gaussian_log_likelihood(a["x"], pixels),
    }


def resampler(meta, inputs, params):
    config = meta["config"]
    steps, prob = config["num_timesteps"], config["uniform_prob"]
    sampler = timesteps.loss_second_moment(steps, history=config["history_per_term"], uniform_prob=prob)
    state = sampler.init()

    def weights(state):
        """Unnormalised weights, as the published sampler reports them: ones until it is warm."""
        p = np.asarray(timesteps.probabilities(state, prob))
        warm = bool(np.all(np.asarray(state.counts) == config["history_per_term"]))
        return (p if warm else np.ones(steps)), warm

    rows = [weights(state)]
    for t, loss in zip(inputs["timesteps"], inputs["losses"], strict=True):
        state = sampler.update(state, jnp.asarray((t + 1) / steps, jnp.float32), jnp.asarray(loss, jnp.float32))
        rows.append(weights(state))
    p = timesteps.probabilities(state, prob)
    return {
        "weights": np.stack([w for w, _ in rows]),
        "warmed_up": np.array([warm for _, warm in rows], np.int64),
        "loss_weight": 1 / (steps * p),
    }


# ---- diffusers' schedulers ------------------------------------------------------------------------------------------


def _train_betas(args):
    betas = {
        "linear": schedules.linear_betas,
        "scaled_linear": schedules.quad_betas,
        "squaredcos_cap_v2": schedules.cosine_betas,
    }
    if args["beta_schedule"] not in betas:
        raise NotImplementedError(f"beta_schedule {args['beta_schedule']}")
    steps, name = args["num_train_timesteps"], args["beta_schedule"]
    if name == "linear":  # linear_betas scales with 1000 / T, diffusers does not
        return np.linspace(args["beta_start"], args["beta_end"], steps)
    return betas[name](steps, args["beta_start"], args["beta_end"])


def _spaced(args, count):
    steps = args["num_train_timesteps"]
    spacing = args.get("timestep_spacing", "leading")
    if spacing == "leading":
        return (np.arange(count) * (steps // count))[::-1] + args.get("steps_offset", 0)
    if spacing == "trailing":
        return np.round(np.arange(steps, 0, -steps / count)).astype(np.int64) - 1
    return np.round(np.linspace(0, steps - 1, count))[::-1].astype(np.int64)


def scheduler_loop(meta, inputs, params):
    config = meta["config"]
    name, args = config["scheduler"], config["args"]
    solvers = ("DPMSolverMultistepScheduler", "UniPCMultistepScheduler", "HeunDiscreteScheduler")
    known = ("DDPMScheduler", "DDIMScheduler", "DDIMInverseScheduler", *solvers)
    unusual = {
        "rescale_betas_zero_snr": False,
        "thresholding": False,
        "use_karras_sigmas": False,
        "use_exponential_sigmas": False,
        "use_beta_sigmas": False,
        "use_lu_lambdas": False,
        "use_flow_sigmas": False,
        "use_dynamic_shifting": False,
        "euler_at_final": False,
        "lower_order_final": True,
        "disable_corrector": [],
        "predict_x0": True,
    }
    if name not in known:
        raise NotImplementedError(f"scheduler {name}")
    if name in solvers:
        return solver_loop(meta, inputs)
    for key, plain in unusual.items():
        if args.get(key, plain) != plain:
            raise NotImplementedError(f"{name} with {key}={args[key]}")
    predicts = {"epsilon": "eps", "sample": "x", "v_prediction": "v"}[args["prediction_type"]]
    variance = args.get("variance_type", "fixed_small")
    if variance not in ("fixed_small", "fixed_large"):
        raise NotImplementedError(f"{name} with variance_type={variance}")
    eta = config.get("step_args", {}).get("eta", 0.0)
    steps = args["num_train_timesteps"]
    schedule = schedules.discrete(_train_betas(args))
    draws = nhwc(inputs["noise"]) if "noise" in inputs else None
    limit = args.get("clip_sample_range", 1.0)

    def denoise(z, step, **cond):
        out = z * process.expand(step.t.time / (step.t.time + 1), z)
        p = process.predict(out, z, step, predicts=predicts, variance=variance)
        # diffusers clips x alone, and keeps the network's eps
        return p._replace(x=jnp.clip(p.x, -limit, limit)) if args.get("clip_sample") else p

    def level(t):
        t = np.asarray(t)
        at = schedule((t + 1) / steps)
        end = np.inf if args.get("set_alpha_to_one", True) else schedule(np.array([1 / steps])).logsnr[0]
        return NoiseLevel(time=t.astype(np.float64), logsnr=np.where(t < 0, end, at.logsnr))

    got = {}
    for count in config["num_inference_steps"]:
        t = _spaced(args, count)
        if name == "DDIMInverseScheduler":
            t = t[::-1]
            behind = np.minimum(t - steps // count, steps - 1)
            # the clock reads the level that is reached; the data lie one stride below it
            here = NoiseLevel(time=t.astype(np.float64), logsnr=level(behind).logsnr)
            table = jax.tree.map(lambda a: np.asarray(a, np.float32), (here, level(t)))

            def climb(z, levels):
                at, up = jax.tree.map(lambda a: jnp.broadcast_to(a, z.shape[:1]), levels)
                z = samplers.climb_step(denoise, z, schedules.to_clean(at), up)
                return z, z

            x_final, path = jax.lax.scan(climb, nhwc(inputs["x"]), table)
        else:
            s = np.append(t[1:], -1) if name == "DDPMScheduler" else t - steps // count
            table = schedules.between(level(t), level(np.maximum(s, -1)))
            sampler = samplers.ddpm() if name == "DDPMScheduler" else samplers.ddim(eta)
            noise = (lambda i: draws[i]) if draws is not None else (lambda i: jnp.zeros(()))

            def run(table, sampler=sampler, noise=noise):
                return samplers.sample(denoise, nhwc(inputs["x"]), noise, table, sampler)

            x_final, path = run(table), run(table[:1])[None]
        got |= {f"{count}.timesteps": t, f"{count}.x_first": nchw(path[0]), f"{count}.x_final": nchw(x_final)}
    return got


def _solver(name, args):
    """The sampler and what the scheduler calls its last level."""
    order, kind = args.get("solver_order", 2), args.get("solver_type", "midpoint")
    algorithm = args.get("algorithm_type", "dpmsolver++")
    if name == "HeunDiscreteScheduler":
        return samplers.heun(), "zero"
    if name == "UniPCMultistepScheduler":
        if (order, kind) != (2, "bh2"):
            raise NotImplementedError(f"{name} of order {order}, type {kind}")
        return samplers.unipc(), args.get("final_sigmas_type", "zero")
    if kind not in ("midpoint", "heun") or algorithm not in ("dpmsolver", "dpmsolver++"):
        raise NotImplementedError(f"{name} with {algorithm}, {kind}")
    predicts = "x" if algorithm == "dpmsolver++" else "eps"
    try:
        return samplers.dpm_solver(order, predicts=predicts, solver_type=kind), args.get("final_sigmas_type", "zero")
    except ValueError as error:
        raise NotImplementedError(f"{name}: {error}") from error


def _solver_timesteps(args, count, heun):
    """Noisiest first. The multistep schedulers leave out the last of one step more, Heun's keeps both ends."""
    spacing, steps, more = args["timestep_spacing"], args["num_train_timesteps"], 0 if heun else 1
    if spacing == "linspace":
        t = np.linspace(0, steps - 1, count + more)[::-1][:count]
        return t if heun else np.round(t).astype(np.int64)
    if spacing == "leading":
        return (np.arange(count + more) * (steps // (count + more)))[::-1][:count] + args.get("steps_offset", 0)
    if spacing == "trailing":
        return np.round(np.arange(steps, 0, -steps / count)).astype(np.int64) - 1
    raise NotImplementedError(f"timestep_spacing {spacing}")


def solver_loop(meta, inputs):
    """The schedulers of probability flow solvers, which number and scale things in their own ways."""
    config = meta["config"]
    name, args = config["scheduler"], config["args"]
    steps, heun = args["num_train_timesteps"], name == "HeunDiscreteScheduler"
    plain = {"rescale_betas_zero_snr": False, "thresholding": False, "euler_at_final": False, "lower_order_final": True}
    plain |= {key: False for key in args if key.startswith("use_")}
    plain |= {"disable_corrector": [], "predict_x0": True}
    for key, value in plain.items():
        if args.get(key, value) != value:
            raise NotImplementedError(f"{name} with {key}={args[key]}")
    predicts = {"epsilon": "eps", "sample": "x", "v_prediction": "v"}[args["prediction_type"]]
    wraps = [guidance.clip_denoised(args["clip_sample_range"])] if args.get("clip_sample") else []
    sampler, ends = _solver(name, args)
    schedule = schedules.discrete(_train_betas(args))

    def denoise(z, step, **cond):
        out = z * process.expand(step.t.time / (step.t.time + 1), z)
        return process.predict(out, z, step, predicts=predicts, variance="fixed_small")

    denoise, got = guidance.guided(denoise, wraps), {}
    for count in config["num_inference_steps"]:
        t = _solver_timesteps(args, count, heun)
        if heun:  # fractional steps: sigma / alpha is interpolated between those of the chain
            chain = schedule(np.arange(1, steps + 1) / steps).logsnr
            ratio = np.interp(t, np.arange(steps), np.exp(-chain / 2))
            levels = NoiseLevel(time=t, logsnr=-2 * np.log(ratio))
        else:
            levels = schedule((t + 1) / steps)
        end = schedule(np.array([1 / steps])) if ends == "sigma_min" else None
        logsnr = np.append(levels.logsnr[1:], np.inf if end is None else end.logsnr)
        s = NoiseLevel(time=np.append(levels.time[1:], 0.0), logsnr=logsnr)
        table = schedules.between(levels, s)
        sigmas = np.exp(-np.append(levels.logsnr, logsnr[-1]) / 2)
        x = nhwc(inputs["x"])
        if heun:  # it starts from x times the largest sigma / alpha, or times 1 / alpha
            first = jax.tree.map(lambda a: jnp.asarray(a[:1], jnp.float32), levels)
            x = x if args["timestep_spacing"] == "leading" else process.expand(first.sigma, x) * x
            got[f"{count}.timesteps"] = np.concatenate([t[:1], np.repeat(t[1:], 2)])
            got[f"{count}.sigmas"] = np.concatenate([sigmas[:1], np.repeat(sigmas[1:-1], 2), sigmas[-1:]])
            at = jax.tree.map(lambda a: jnp.asarray(a[:1]), table)
            euler = samplers.ddim(0.0).step(denoise, x, at, jnp.zeros(()), ())[0] / process.expand(at.s.alpha, x)
            got[f"{count}.x_first"] = nchw(euler)
        else:
            got |= {f"{count}.timesteps": t, f"{count}.sigmas": sigmas}
            one = jax.tree.map(lambda a: jnp.asarray(a[:1]), table)
            got[f"{count}.x_first"] = nchw(sampler.step(denoise, x, one, None, sampler.init(x, len(t)))[0])
        walk = jax.jit(lambda x, table=table: samplers.sample(denoise, x, lambda i: jnp.zeros(()), table, sampler))
        got[f"{count}.x_final"] = nchw(walk(x))
    return got


RUNNERS = {
    "guided_diffusion.schedule": schedule,
    "guided_diffusion.respacing": respacing,
    "glide.diffusion": respacing,
    "guided_diffusion.q": q,
    "guided_diffusion.step": step,
    "guided_diffusion.bpd_loop": bpd_loop,
    "guided_diffusion.guidance": guided_steps,
    "guided_diffusion.sample_loop": sample_loop,
    "guided_diffusion.losses": loss_terms,
    "guided_diffusion.resampler": resampler,
    "diffusers.scheduler_loop": scheduler_loop,
}
