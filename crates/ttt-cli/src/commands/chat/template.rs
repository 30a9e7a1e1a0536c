//! A model's chat template: Jinja, as `transformers` renders it.

use std::path::Path;

use anyhow::{Context, Result, bail};
use minijinja::{Environment, Error, ErrorKind, Value, context};
use serde_json::Value as Json;

/// One message of a conversation.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Message {
    /// `system`, `user` or `assistant`.
    pub role: &'static str,
    /// Its text.
    pub content: String,
}

/// How a model's makers turned conversations into text.
pub struct Template {
    environment: Environment<'static>,
    bos: String,
    eos: String,
}

const NAME: &str = "chat_template";

impl Template {
    /// The template of a model folder (`chat_template.jinja`, or `chat_template` in `tokenizer_config.json`), if it has one.
    ///
    /// # Errors
    /// A file that cannot be read, or a template that does not parse.
    pub fn of_folder(folder: &Path) -> Result<Option<Template>> {
        let file = folder.join("tokenizer_config.json");
        let config: Json = match std::fs::read(&file) {
            Ok(bytes) => serde_json::from_slice(&bytes).with_context(|| format!("{} is not JSON", file.display()))?,
            Err(e) if e.kind() == std::io::ErrorKind::NotFound => Json::Null,
            Err(e) => return Err(e).with_context(|| file.display().to_string()),
        };
        let jinja = folder.join("chat_template.jinja");
        let source = if jinja.exists() {
            Some(std::fs::read_to_string(&jinja).with_context(|| jinja.display().to_string())?)
        } else {
            in_config(&config["chat_template"])
        };
        // A special token is text, or an object around it.
        let special = |name: &str| {
            let token = &config[name];
            token.as_str().or_else(|| token["content"].as_str()).unwrap_or_default().to_owned()
        };
        source.map(|source| Template::new(source, special("bos_token"), special("eos_token"))).transpose()
    }

    fn new(source: String, bos: String, eos: String) -> Result<Template> {
        let mut environment = Environment::new();
        environment.set_trim_blocks(true);
        environment.set_lstrip_blocks(true);
        // Templates call methods of Python's strings, lists and dictionaries.
        environment.set_unknown_method_callback(minijinja_contrib::pycompat::unknown_method_callback);
        environment.add_function("raise_exception", |message: String| -> Result<Value, Error> {
            Err(Error::new(ErrorKind::InvalidOperation, message))
        });
        environment.add_template_owned(NAME, source).context("the model's chat template is not valid Jinja")?;
        Ok(Template { environment, bos, eos })
    }

    /// A text without the token that begins one.
    pub fn without_bos<'t>(&self, text: &'t str) -> &'t str {
        if self.bos.is_empty() { text } else { text.strip_prefix(self.bos.as_str()).unwrap_or(text) }
    }

    /// The text of a conversation, up to where the assistant's next message begins.
    ///
    /// # Errors
    /// What the template raises, such as for roles in an order that it does not allow.
    pub fn render(&self, messages: &[Message]) -> Result<String> {
        let messages: Vec<Value> = messages.iter().map(|m| context! { role => m.role, content => m.content.as_str() }).collect();
        let template = self.environment.get_template(NAME).expect("was added");
        let text = template.render(context! {
            messages, add_generation_prompt => true, bos_token => self.bos.as_str(), eos_token => self.eos.as_str(),
        });
        match text {
            Ok(text) if text.is_empty() => bail!("the model's chat template makes no text of this conversation"),
            Ok(text) => Ok(text),
            Err(e) => bail!("the model's chat template: {}", e.detail().map_or_else(|| e.to_string(), str::to_owned)),
        }
    }
}

/// A template, or the one called `default` of several.
fn in_config(value: &Json) -> Option<String> {
    if let Some(several) = value.as_array() {
        let named = several.iter().find(|t| t["name"] == "default").or(several.first())?;
        return named["template"].as_str().map(str::to_owned);
    }
    value.as_str().map(str::to_owned)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn message(role: &'static str, content: &str) -> Message {
        Message { role, content: content.to_owned() }
    }

    const CHATML: &str = "{{ bos_token }}{% for m in messages %}\n    {%- if loop.first and m['role'] == 'assistant' %}\n        {{- raise_exception('the user begins') }}\n    {%- endif %}\n    {{- '<|im_start|>' + m.role + '\\n' + m.content.strip() + '<|im_end|>\\n' }}\n{%- endfor %}\n{%- if add_generation_prompt %}\n    {{- '<|im_start|>assistant\\n' }}\n{%- endif %}";

    #[test]
    fn renders_what_transformers_renders() {
        let template = Template::new(CHATML.into(), "<s>".into(), "</s>".into()).unwrap();
        let text = template.render(&[message("system", " Be kind. "), message("user", "Hi")]).unwrap();
        assert_eq!(text, "<s><|im_start|>system\nBe kind.<|im_end|>\n<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n");
        let error = template.render(&[message("assistant", "Hi")]).unwrap_err().to_string();
        assert!(error.contains("the user begins"), "{error}");
    }

    #[test]
    fn finds_the_template_of_a_folder() {
        let folder = tempfile::tempdir().unwrap();
        let write = |name: &str, text: &str| std::fs::write(folder.path().join(name), text).unwrap();
        assert!(Template::of_folder(folder.path()).unwrap().is_none());
        write("tokenizer_config.json", r#"{"bos_token": {"content": "<s>"}}"#);
        assert!(Template::of_folder(folder.path()).unwrap().is_none());
        let several = r#"{"bos_token": {"content": "<s>"}, "chat_template": [{"name": "tool", "template": "t"}, {"name": "default", "template": "{{ bos_token }}d"}]}"#;
        write("tokenizer_config.json", several);
        let render = || Template::of_folder(folder.path()).unwrap().unwrap().render(&[]).unwrap();
        assert_eq!(render(), "<s>d");
        write("chat_template.jinja", "{{ bos_token }}f");
        assert_eq!(render(), "<s>f");
        write("chat_template.jinja", "{% if %}");
        assert!(Template::of_folder(folder.path()).is_err());
    }
}
