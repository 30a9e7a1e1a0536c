//! The training loop.

use std::collections::VecDeque;
use std::path::{Path, PathBuf};
use std::time::Instant;

use crate::batch::Batch;
use crate::config::Config;
use crate::data::{Sampler, Streams, Tokenizer};
use crate::device::{Device, probe};
use crate::eval::{Evaluation, evaluate_batch};
use crate::generate::{Generator, Sampling};
use crate::hub::{ModelFolder, Skill, SkillInfo, write_atomic};
use crate::layer::Keep;
use crate::lm::Lm;
use crate::ops::adamw;
use crate::plan::{self, Place, Step};
use crate::state::States;
use crate::tensor::DType;
use crate::train::checkpoint::{self, Checkpoints, TrainerState};
use crate::train::corpus::{self, Corpus};
use crate::train::lock::{self, RunLock};
use crate::train::metrics::{InnerLoss, Metrics, Record, Split};
use crate::train::observe::{Event, Observer};
use crate::train::settings::{Carry as Over, Recompute};
use crate::train::step::{Carry, MicroBatch, Optimizer, StepReport, StepSettings};
use crate::train::tensorboard::EventFile;
use crate::train::{Settings, batches, metrics, plot};
use crate::{AtPath, Error, Result};

/// What to train, where.
#[derive(Clone, Debug)]
pub struct Job {
    /// Settings of the run.
    pub settings: Settings,
    /// The run folder.
    pub folder: PathBuf,
    /// Whether to go on from the folder's newest checkpoint.
    pub resume: bool,
    /// Where to train.
    pub device: Device,
}

/// How a run ended.
#[derive(Clone, Debug)]
pub struct Outcome {
    /// The last validation.
    pub validation: Record,
    /// Folder of the final model.
    pub model: PathBuf,
    /// File of the learned initial state, when that is all that was learned.
    pub skill: Option<PathBuf>,
    /// Time trained.
    pub seconds: f64,
}

/// Trains to the end, or until the observer interrupts.
///
/// # Errors
/// Settings, data or files that cannot be used; [`Error::NotFinite`]; [`Error::Interrupted`] after a checkpoint was written.
pub fn run(job: &Job, observer: &dyn Observer) -> Result<Outcome> {
    job.settings.validate()?;
    check_folder(job)?;
    let lock = job.resume.then(|| RunLock::take(&job.folder)).transpose()?;
    let mut settings = job.settings.located()?;
    if job.resume {
        settings = settings.continued(&Settings::of_run(&job.folder)?.located()?, &job.folder)?;
        settings.validate()?;
    }
    let job = Job { settings, ..job.clone() };
    let run = Run::new(&job, lock, observer);
    run.and_then(|mut run| run.train(observer)).map_err(|e| job.settings.advised(&job.device, e))
}

/// Checks the run folder; an existing run is never overwritten.
fn check_folder(job: &Job) -> Result<()> {
    let settings = job.folder.join("settings.toml");
    if job.resume {
        return match settings.exists() {
            true => Ok(()),
            false => Err(Error::Config(format!("{} is no run folder: it holds no settings.toml", job.folder.display()))),
        };
    }
    let names = std::fs::read_dir(&job.folder).into_iter().flatten().flatten().map(|entry| entry.file_name());
    let in_use = names.into_iter().any(|name| name != lock::NAME);
    if in_use {
        return Err(Error::Config(format!(
            "the run folder {0} exists and is not empty; continue it with `--resume {0}`, or name another one",
            job.folder.display()
        )));
    }
    Ok(())
}

/// Everything that lives as long as the run.
struct Run<'j> {
    job: &'j Job,
    config: Config,
    model: Lm,
    optimizer: Optimizer,
    tokenizer: Tokenizer,
    corpus: Corpus,
    streams: Streams,
    /// What the streams have read, when sequences are cut: slot i is that of stream i.
    carried: Option<States>,
    /// Windows of the validation text.
    validation: Sampler,
    /// What forward passes keep.
    keep: Keep,
    place: Place,
    /// Ids of the sample prompt.
    prompt: Vec<u32>,
    checkpoints: Checkpoints,
    state: TrainerState,
    metrics: Metrics,
    events: Option<EventFile>,
    /// Floating-point operations a second that the device reaches in a matrix product.
    peak_flops: f64,
    started: Instant,
    /// Steps that were queued and not looked at yet.
    queued: VecDeque<Queued>,
    /// Seconds in steps, and tokens, since the last record of a step.
    since_record: (f64, u64),
    _lock: RunLock,
}

/// A step that was queued.
struct Queued {
    /// Steps made with it.
    step: u64,
    /// Tokens read with it.
    tokens: u64,
    /// Learning rate.
    lr: f64,
}

impl<'j> Run<'j> {
    fn new(job: &'j Job, lock: Option<RunLock>, observer: &dyn Observer) -> Result<Run<'j>> {
        let checkpoints = Checkpoints::new(&job.folder, job.settings.checkpoint.keep, job.settings.checkpoint.milestone_every);
        let newest = if job.resume { checkpoints.latest()? } else { None };
        let settings = &job.settings;
        let config = settings.model_config()?;
        let tokenizer = corpus::tokenizer(settings, &config, newest.as_deref())?;
        if let Some(warning) = tokenizer.unused_ids(config.vocab_size) {
            observer.event(Event::Warning(&warning));
        }
        let prompt = corpus::sample_prompt(settings, &tokenizer)?;
        let corpus = Corpus::open(settings, &job.folder, &config, &tokenizer, observer)?;
        let sampler = Sampler::new(corpus.train().len(), settings.train.sequence_length, settings.train.seed)?;
        let streams = Streams::new(sampler, settings.sequences_per_step(), settings.segmenting(config.mini_batch().unwrap_or(1)));
        let validation = Sampler::new(corpus.validation().len(), settings.train.sequence_length, 0).map_err(|e| match e {
            Error::Data(message) => {
                Error::Data(format!("validation part: {message}, name data.validation_paths, or raise data.validation_fraction"))
            }
            other => other,
        })?;

        let dtype = settings.train.precision.dtype(&job.device);
        if dtype == DType::Bf16 && job.device.as_cuda().is_none() {
            return Err(Error::Config("train.precision=bf16 needs a GPU; use auto or f32 on a CPU".into()));
        }
        let mut model = match &settings.model.folder {
            Some(folder) => {
                let folder = ModelFolder::open(folder)?;
                folder.check_trainable()?;
                Lm::from_folder(&folder, &config, &job.device, dtype)?
            }
            None => Lm::new(&config, &job.device, dtype, settings.train.seed)?,
        };
        let mut optimizer = match settings.train.only_initial_state {
            true => Optimizer::of_initial_state(&model)?,
            false => Optimizer::new(&model)?,
        };
        let mut carried = settings.carries().then(|| model.states(streams.streams())).transpose()?;
        let place = Place::of(&job.device, dtype);
        let keep = settings.keep(&config, place, job.device.memory().room());
        let data = corpus.id(settings, &tokenizer);
        let state = match newest {
            Some(folder) => checkpoint::load(&folder, &mut model, &mut optimizer, carried.as_mut())?,
            None => TrainerState::new(data.clone()),
        };
        let changes = state.data.changes(&data);
        if !changes.is_empty() {
            return Err(Error::Data(format!(
                "{0} was trained on something else: {1}; put that back, or start a new run from its weights with `--init-from {0}`",
                job.folder.display(),
                changes.join(", ")
            )));
        }
        if state.step > settings.steps() {
            return Err(Error::Config(format!(
                "the run has made {} steps, but train.tokens {} are {} steps; raise train.tokens to go on",
                state.step,
                settings.train.tokens,
                settings.steps()
            )));
        }
        // Only now is it known that the run can be made. Of two runs that want the folder at once, one gets it.
        if let Some(parent) = job.folder.parent().filter(|p| *p != Path::new("")) {
            std::fs::create_dir_all(parent).at(parent)?;
        }
        let lock = match lock {
            Some(lock) => lock,
            None => {
                std::fs::create_dir_all(&job.folder).at(&job.folder)?;
                let lock = RunLock::take(&job.folder)?;
                check_folder(job)?;
                lock
            }
        };
        let text = settings.to_toml();
        write_atomic(job.folder.join("settings.toml"), |w| w.write_all(text.as_bytes()))?;
        let path = job.folder.join("metrics.jsonl");
        let metrics = if state.step > 0 { Metrics::resume(path, state.step)? } else { Metrics::create(path)? };
        let resumed = (state.step > 0).then_some(state.step);
        let events = settings.log.tensorboard.then(|| EventFile::create(job.folder.join("events"), resumed)).transpose()?;
        let peak_flops = probe::matmul_flops(&job.device)?;
        Ok(Run {
            job,
            config,
            model,
            optimizer,
            tokenizer,
            corpus,
            streams,
            carried,
            validation,
            keep,
            place,
            prompt,
            checkpoints,
            state,
            metrics,
            events,
            peak_flops,
            started: Instant::now(),
            queued: VecDeque::new(),
            since_record: (0.0, 0),
            _lock: lock,
        })
    }

    /// The loop. It runs once more than there are steps, so that the end is evaluated, sampled and saved by the same lines.
    fn train(&mut self, observer: &dyn Observer) -> Result<Outcome> {
        let settings = self.job.settings.clone();
        let steps = settings.steps();
        let from_step = self.state.step;
        let earlier = self.state.elapsed_seconds;
        observer.event(Event::Start {
            config: &self.config,
            memory: Step { keep: self.keep, ..settings.planned_step(&self.config, self.place) }.memory(),
            keep: self.keep,
            parameters: self.model.params().table().parameters(),
            learned: self.optimizer.m.table().parameters(),
            train_tokens: self.corpus.train().len() as u64,
            validation_tokens: self.corpus.validation().len() as u64,
            from_step,
            steps,
        });
        let due = |step: u64, every: u64| step == steps || (every > 0 && step > 0 && step.is_multiple_of(every));
        let mut validation = None;
        loop {
            let step = self.state.step;
            self.state.elapsed_seconds = earlier + self.started.elapsed().as_secs_f64();
            let evaluates = due(step, settings.eval.every) || step == 0;
            let samples = settings.sample.every > 0 && due(step, settings.sample.every);
            let milestone = settings.checkpoint.milestone_every;
            let saves = due(step, settings.checkpoint.every) || (milestone > 0 && due(step, milestone));
            if evaluates || samples || saves {
                self.settle(0, earlier, observer)?;
            }

            // Evaluate.
            if evaluates {
                let record = self.evaluate()?;
                self.log(&record, observer)?;
                if !record.loss.is_finite() {
                    return Err(Error::NotFinite { step, tensor: "validation loss".into(), element: 0 });
                }
                let better = self.state.best_loss.is_none_or(|best| record.loss < best);
                if better && step > 0 {
                    self.state.best_loss = Some(record.loss);
                    if settings.checkpoint.best {
                        checkpoint::save_model(&self.job.folder.join("best"), &self.model, &self.tokenizer)?;
                    }
                }
                validation = Some(record);
            }
            // Sample.
            if samples {
                observer.event(Event::Sample(&self.sample()?));
            }
            // Save.
            let interrupted = observer.interrupted();
            if interrupted {
                self.settle(0, earlier, observer)?;
            }
            if step > from_step && (saves || interrupted) {
                let path = {
                    let carried = self.carried.as_ref();
                    self.checkpoints.save(&self.model, &self.optimizer, &self.tokenizer, &self.state, carried)?
                };
                observer.event(Event::Saved(&path));
            }
            // Stop.
            if interrupted {
                self.plot()?;
                return Err(Error::Interrupted);
            }
            if step >= steps {
                break;
            }
            // Step.
            let lr = settings.learning_rate().at(step);
            let start = Instant::now();
            self.queue(lr)?;
            self.since_record.0 += start.elapsed().as_secs_f64();
            self.since_record.1 += settings.train.batch_tokens;
            self.state.step += 1;
            self.state.tokens += settings.train.batch_tokens;
            self.queued.push_back(Queued { step: self.state.step, tokens: self.state.tokens, lr });
            // Of a GPU a step is looked at while it makes the next one.
            self.settle(usize::from(self.job.device.as_cuda().is_some()), earlier, observer)?;
        }
        let model = self.job.folder.join("final");
        checkpoint::save_model(&model, &self.model, &self.tokenizer)?;
        let skill = settings.train.only_initial_state.then(|| self.save_skill()).transpose()?;
        self.plot()?;
        let validation = validation.expect("the last pass of the loop evaluates");
        Ok(Outcome { validation, model, skill, seconds: self.state.elapsed_seconds })
    }

    fn save_skill(&self) -> Result<PathBuf> {
        let folder = std::path::absolute(&self.job.folder).at(&self.job.folder)?;
        let info = SkillInfo {
            name: folder.file_name().unwrap_or_default().to_string_lossy().into_owned(),
            tokens: self.state.tokens,
            tokenizer: self.tokenizer.fingerprint().to_owned(),
        };
        let path = self.job.folder.join("skill.safetensors");
        Skill::save(&path, self.model.params(), &info)?;
        Ok(path)
    }

    /// Reads and reports steps until at most `left` are left to be read.
    fn settle(&mut self, left: usize, earlier: f64, observer: &dyn Observer) -> Result<()> {
        let every = self.job.settings.log.every;
        while self.queued.len() > left {
            let start = Instant::now();
            let report = self.optimizer.settle(&self.model, self.carried.as_ref())?.expect("a step was queued");
            self.since_record.0 += start.elapsed().as_secs_f64();
            let queued = self.queued.pop_front().expect("as many as the optimizer has");
            let record = self.train_record(&report, &queued, earlier);
            let last = self.job.settings.steps();
            if queued.step == last || queued.step == 1 || (every > 0 && queued.step.is_multiple_of(every)) {
                self.since_record = (0.0, 0);
                self.log(&record, observer)?;
            } else {
                observer.event(Event::Step(&record));
            }
        }
        Ok(())
    }

    /// Queues a step; on a CPU it is made then.
    fn queue(&mut self, lr: f64) -> Result<()> {
        let settings = &self.job.settings;
        let o = &settings.optimizer;
        let step = StepSettings {
            lr,
            inner_lr: settings.inner_learning_rate(&self.config).multiplier(self.state.step),
            clip: if o.clip > 0.0 { o.clip } else { f64::INFINITY },
            adamw: adamw::Settings { beta1: o.beta1, beta2: o.beta2, eps: o.eps, weight_decay: o.weight_decay },
            keep: self.keep,
        };
        // Of each group of streams the segments of the step.
        let (tokens, at_once) = (self.corpus.train(), settings.micro_batch());
        let streams = |first: usize| first..first + at_once;
        let segment = |first, i| batches::segments(tokens, &self.streams.stretches(tokens, self.state.step, streams(first), i));
        let segments = |first| (0..self.streams.per_step()).map(|i| segment(first, i)).collect();
        let groups: Vec<Vec<MicroBatch>> = (0..self.streams.streams()).step_by(at_once).map(segments).collect();
        match &mut self.carried {
            Some(states) => {
                let gradient = settings.train.carry == Over::Gradient;
                let carry = Carry { states, gradient, recompute: settings.train.recompute == Recompute::Segment };
                self.optimizer.queue_segments(&mut self.model, &groups, carry, &step)
            }
            None => self.optimizer.queue(&mut self.model, &groups.into_iter().flatten().collect::<Vec<_>>(), &step),
        }
    }

    /// Reads evenly spaced windows of the validation text, each from the initial weights.
    fn evaluate(&self) -> Result<Record> {
        let settings = &self.job.settings;
        let tokens = self.corpus.validation();
        let sampler = &self.validation;
        let all = sampler.windows_per_epoch() as usize;
        let wanted = (settings.eval.tokens as usize / settings.train.sequence_length).clamp(1, all);
        let chosen: Vec<usize> = (0..wanted).map(|i| i * all / wanted).collect();
        let mut sums = Evaluation::default();
        let mut inner = None;
        // So many that they are at most as many tokens as a micro-batch.
        let at_once = settings.micro_batch() * settings.segment_length() / settings.train.sequence_length;
        for windows in chosen.chunks(at_once.max(1)) {
            let m = batches::windows(tokens, sampler, windows);
            let targets = |window: &usize| tokens.bytes_in(sampler.range(*window).start + 1..sampler.range(*window).end);
            let bytes = windows.iter().map(targets).sum();
            sums.add(&evaluate_batch(&self.model, &m.batch, &m.targets, &m.mask, bytes)?);
            if inner.is_none() && self.config.inner().is_some() {
                // Of one segment: every mini-batch's weights are held for it.
                inner = Some(self.inner_losses(&Batch::one(&m.batch.tokens[..settings.segment_length()]))?);
            }
        }
        if sums.tokens == 0 {
            return Err(Error::Data("the validation part has no target that counts: all of it is prompts".into()));
        }
        Ok(Record {
            bits_per_byte: Some(sums.bits_per_byte()),
            elapsed_seconds: Some(self.state.elapsed_seconds),
            memory_bytes: Some(self.job.device.memory().usage().peak as u64),
            inner,
            ..Record::new(Split::Validation, self.state.step, self.state.tokens, sums.loss())
        })
    }

    /// The inner loop's errors of every layer, means over a batch's mini-batches.
    fn inner_losses(&self, batch: &Batch) -> Result<Vec<InnerLoss>> {
        let mean = |values: &[f64]| values.iter().sum::<f64>() / values.len() as f64;
        let layers = self.model.inner_statistics(batch)?;
        let loss = |s: &crate::layer::InnerStatistics| InnerLoss {
            mse_init: mean(&s.initial),
            mse_step_0: mean(&s.before),
            mse_step_1: mean(&s.after),
        };
        Ok(layers.iter().map(loss).collect())
    }

    fn train_record(&self, report: &StepReport, queued: &Queued, earlier: f64) -> Record {
        let elapsed = earlier + self.started.elapsed().as_secs_f64();
        let speed = self.since_record.1 as f64 / self.since_record.0.max(1e-9);
        let train = self.corpus.train();
        let flops = plan::flops(&self.config, self.job.settings.train.sequence_length);
        let per_token = if self.job.settings.train.only_initial_state { flops.training_initial_state() } else { flops.training };
        let bytes = report.counted * train.bytes_of_text() as f64 / train.len() as f64;
        Record {
            bits_per_byte: (bytes > 0.0).then(|| report.nll / std::f64::consts::LN_2 / bytes),
            lr: Some(queued.lr),
            grad_norm: Some(report.grad_norm),
            tokens_per_second: Some(speed),
            mfu: Some(per_token * speed / self.peak_flops),
            elapsed_seconds: Some(elapsed),
            memory_bytes: Some(self.job.device.memory().usage().peak as u64),
            ..Record::new(Split::Train, queued.step, queued.tokens, report.loss)
        }
    }

    fn log(&mut self, record: &Record, observer: &dyn Observer) -> Result<()> {
        self.metrics.write(record)?;
        if let Some(events) = &mut self.events {
            events.write_record(record)?;
        }
        observer.event(Event::Logged(record));
        Ok(())
    }

    fn sample(&self) -> Result<String> {
        let sample = &self.job.settings.sample;
        let sampling = Sampling { temperature: 0.8, top_p: 0.95, seed: self.state.step, ..Sampling::default() };
        let mut generator = Generator::new(&self.model, sampling)?;
        let mut states = States::new(&self.model, 1)?;
        generator.read(&mut states, 0, &self.prompt)?;
        let mut text = self.tokenizer.stream();
        let mut shown = sample.prompt.clone();
        for _ in 0..sample.tokens {
            let choice = generator.choose();
            if Some(choice.token) == self.tokenizer.eos() {
                break;
            }
            shown += &text.push(choice.token);
            generator.read(&mut states, 0, &[choice.token])?;
        }
        Ok(shown + &text.finish())
    }

    fn plot(&self) -> Result<()> {
        let records = metrics::read(self.job.folder.join("metrics.jsonl"))?;
        let millions = self.model.params().table().parameters() as f64 / 1e6;
        let title = format!("{}, {millions:.1} million parameters", self.config.kind());
        plot::write_loss_svg(self.job.folder.join("loss.svg"), &records, &title)
    }
}
