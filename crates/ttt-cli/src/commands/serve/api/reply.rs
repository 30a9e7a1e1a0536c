//! From the engine's events to an answer, whole or streamed.

use std::convert::Infallible;
use std::sync::Arc;
use std::time::SystemTime;

use axum::Json;
use axum::response::sse::{self, KeepAlive, Sse};
use axum::response::{IntoResponse, Response};
use base64::Engine as _;
use base64::prelude::BASE64_STANDARD;
use futures_util::Stream;
use serde_json::{Map, Value, json};
use tokio::sync::mpsc::{UnboundedReceiver, unbounded_channel};

use super::request::{Common, Start, job};
use super::states::keep;
use super::{ApiError, App};
use crate::commands::serve::auth::Owner;
use crate::commands::serve::engine::{Event, Failure, Finish, TokenInfo};
use crate::commands::serve::snapshots::hex;
use crate::commands::serve::{random, seconds};

/// A prompt, and its text where that is given back.
pub struct Prompt {
    pub tokens: Vec<u32>,
    pub echo: Option<String>,
}

/// A piece of a choice.
pub struct Part {
    /// Its choice.
    pub choice: usize,
    /// Whether it is the choice's first.
    pub first: bool,
    pub text: String,
    pub tokens: Vec<TokenInfo>,
    /// Characters of the choice before this piece.
    pub offset: usize,
    /// In the last piece: why the choice ended, and what became of its state.
    pub end: Option<(Finish, Map<String, Value>)>,
}

/// How answers look.
pub trait Format: Send + Sync + 'static {
    /// Name of a whole answer, and of a piece of a streamed one.
    const OBJECTS: [&'static str; 2];
    /// Beginning of ids.
    const ID: &'static str;
    /// A choice, or a piece of one, but for its number and end. `piece` says which.
    fn choice(&self, app: &App, part: &Part, piece: bool) -> Map<String, Value>;
}

/// An answer that is being made.
pub struct Reply<F> {
    app: Arc<App>,
    owner: Owner,
    format: F,
    id: String,
    created: u64,
    common: Common,
    parent: Option<String>,
    events: UnboundedReceiver<Event>,
    /// By prompt: what is given back of it.
    prompts: Vec<(Option<String>, Vec<TokenInfo>)>,
    /// By choice: whether something was said, and how many characters.
    said: Vec<(bool, usize)>,
    left: usize,
    usage: [usize; 3],
}

impl<F: Format> Reply<F> {
    /// Queues prompts; `top` is how many likely tokens to report with each token.
    pub fn begin(
        app: &Arc<App>,
        owner: Owner,
        format: F,
        common: Common,
        start: &Start,
        prompts: Vec<Prompt>,
        max_tokens: usize,
        top: Option<usize>,
    ) -> Result<Reply<F>, ApiError> {
        let (sender, events) = unbounded_channel();
        let choices = prompts.len() * common.choices;
        if prompts.is_empty() || choices > app.limits.choices {
            return Err(ApiError::bad(format!("there are {choices} choices in all; there may be 1 to {}", app.limits.choices)));
        }
        let mut jobs = Vec::new();
        for (i, prompt) in prompts.iter().enumerate() {
            let mut job = job(app, &common, start, prompt.tokens.clone(), max_tokens, sender.clone());
            job.first_choice = i * common.choices;
            job.top = top;
            job.prompt_logprobs = top.is_some() && prompt.echo.is_some();
            jobs.push(job);
        }
        app.engine.submit(jobs)?;
        Ok(Reply {
            app: app.clone(),
            owner,
            format,
            id: format!("{}-{}", F::ID, hex(&random::<12>())),
            created: seconds(SystemTime::now()),
            parent: start.id.clone(),
            events,
            prompts: prompts.into_iter().map(|prompt| (prompt.echo, Vec::new())).collect(),
            said: vec![(false, 0); choices],
            left: choices,
            usage: [0; 3],
            common,
        })
    }

    /// The next piece; `None` when all choices are complete.
    async fn next(&mut self) -> Result<Option<Part>, ApiError> {
        while self.left > 0 {
            match self.events.recv().await {
                Some(Event::Started { cached, prompt }) => {
                    self.usage[0] += prompt;
                    self.usage[1] += cached;
                }
                Some(Event::Prompt { choice, tokens }) => self.prompts[choice / self.common.choices].1.extend(tokens),
                Some(Event::Text { choice, text, tokens }) => return Ok(Some(self.part(choice, text, tokens))),
                Some(Event::Finished { choice, reason, tokens, state }) => {
                    self.usage[2] += tokens;
                    let kept = self.keep(state).await?;
                    let mut part = self.part(choice, String::new(), Vec::new());
                    part.end = Some((reason, kept));
                    self.left -= 1;
                    return Ok(Some(part));
                }
                Some(Event::Read { .. }) => {}
                Some(Event::Failed(why)) => return Err(why.into()),
                None => return Err(Failure::Stopping.into()),
            }
        }
        Ok(None)
    }

    /// A piece, behind the prompt where that is given back and nothing was said.
    fn part(&mut self, choice: usize, mut text: String, mut tokens: Vec<TokenInfo>) -> Part {
        let first = !self.said[choice].0;
        if first && let (Some(echo), infos) = &self.prompts[choice / self.common.choices] {
            text.insert_str(0, echo);
            tokens.splice(0..0, infos.iter().cloned());
        }
        let offset = self.said[choice].1;
        self.said[choice] = (true, offset + text.chars().count());
        Part { choice, first, text, tokens, offset, end: None }
    }

    /// Keeps a state as the request says.
    async fn keep(&self, state: Option<Vec<u8>>) -> Result<Map<String, Value>, ApiError> {
        let mut kept = Map::new();
        let Some(state) = state else { return Ok(kept) };
        if self.common.return_state {
            kept.insert("state".into(), BASE64_STANDARD.encode(&state).into());
        }
        if let Some(name) = &self.common.save {
            let described = keep(&self.app, &self.owner, name.clone(), self.parent.clone(), state).await?;
            kept.insert("state_id".into(), described.id.into());
        }
        Ok(kept)
    }

    fn usage(&self) -> Value {
        let [prompt, cached, completion] = self.usage;
        json!({
            "prompt_tokens": prompt, "completion_tokens": completion, "total_tokens": prompt + completion,
            "prompt_tokens_details": {"cached_tokens": cached},
        })
    }

    fn envelope(&self, piece: bool, choices: Vec<Value>) -> Value {
        json!({
            "id": self.id, "object": F::OBJECTS[usize::from(piece)], "created": self.created, "model": self.app.model.name,
            "choices": choices,
        })
    }

    fn choice(&self, part: &Part, piece: bool) -> Value {
        let mut object = self.format.choice(&self.app, part, piece);
        object.insert("index".into(), part.choice.into());
        let reason = part.end.as_ref().map(|(reason, _)| match reason {
            Finish::Stop => "stop",
            Finish::Length => "length",
        });
        object.insert("finish_reason".into(), reason.into());
        if let Some((_, kept)) = &part.end {
            object.extend(kept.clone());
        }
        object.into()
    }

    /// The answer as the request wants it.
    ///
    /// # Errors
    /// What the engine or the store says before anything was sent.
    pub async fn answer(self) -> Result<Response, ApiError> {
        if self.common.stream { self.streamed().await } else { self.whole().await }
    }

    async fn whole(mut self) -> Result<Response, ApiError> {
        let mut choices: Vec<Option<Part>> = self.said.iter().map(|_| None).collect();
        while let Some(part) = self.next().await? {
            match &mut choices[part.choice] {
                Some(choice) => {
                    choice.text += &part.text;
                    choice.tokens.extend(part.tokens);
                    choice.end = part.end;
                }
                none => *none = Some(part),
            }
        }
        let choices = choices.iter().flatten().map(|part| self.choice(part, false)).collect();
        let mut answer = self.envelope(false, choices);
        answer["usage"] = self.usage();
        Ok(Json(answer).into_response())
    }

    async fn streamed(mut self) -> Result<Response, ApiError> {
        // An error before the first piece has a status of its own.
        let first = self.next().await?;
        Ok(Sse::new(self.stream(first)).keep_alive(KeepAlive::default()).into_response())
    }

    fn stream(self, first: Option<Part>) -> impl Stream<Item = Result<sse::Event, Infallible>> {
        enum At<F> {
            Pieces(Reply<F>, Option<Part>),
            Usage(Reply<F>),
            Done,
            Over,
        }
        fn data(value: &Value) -> Result<sse::Event, Infallible> {
            Ok(sse::Event::default().data(value.to_string()))
        }
        futures_util::stream::unfold(At::Pieces(self, first), move |at| async move {
            match at {
                At::Pieces(mut reply, ready) => {
                    let part = match ready {
                        Some(part) => Ok(Some(part)),
                        None => reply.next().await,
                    };
                    Some(match part {
                        Ok(Some(part)) => {
                            let choice = reply.choice(&part, true);
                            let mut piece = reply.envelope(true, vec![choice]);
                            if reply.common.include_usage {
                                piece["usage"] = Value::Null;
                            }
                            (data(&piece), At::Pieces(reply, None))
                        }
                        Ok(None) if reply.common.include_usage => {
                            let mut last = reply.envelope(true, Vec::new());
                            last["usage"] = reply.usage();
                            (data(&last), At::Usage(reply))
                        }
                        Ok(None) => (Ok(sse::Event::default().data("[DONE]")), At::Over),
                        Err(error) => (data(&error.json()), At::Done),
                    })
                }
                At::Usage(_) | At::Done => Some((Ok(sse::Event::default().data("[DONE]")), At::Over)),
                At::Over => None,
            }
        })
    }
}
