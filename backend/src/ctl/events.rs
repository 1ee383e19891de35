//! `stonework ctl events`: what happens from now on.

use serde_json::Value;

use super::{Ctl, Failure};

impl Ctl {
    pub(super) fn events(&mut self, count: Option<u64>, names: &[String]) -> Result<(), Failure> {
        if self.how.dry_run {
            return Err(Failure::Usage(
                "nothing is sent to be told of events: --dry-run has nothing to show".to_owned(),
            ));
        }
        let mut left = count;
        while left != Some(0) {
            let event = self.client()?.event()?;
            let name = event["event"].as_str().unwrap_or_default().to_owned();
            if !names.is_empty() && !names.contains(&name) {
                continue;
            }
            match self.how.json {
                true => self.print(&event.to_string())?,
                false => self.print(&line(&name, &event))?,
            }
            left = left.map(|left| left - 1);
        }
        Ok(())
    }
}

/// `seconds.micros EVENT key=value ...`
fn line(name: &str, event: &Value) -> String {
    let stamp = &event["timestamp"];
    let part = |key: &str| stamp[key].as_u64().unwrap_or(0);
    let mut line = format!("{}.{:06} {name}", part("seconds"), part("microseconds"));
    for (key, value) in event["data"].as_object().into_iter().flatten() {
        line.push_str(&format!(" {key}={value}"));
    }
    line
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    #[test]
    fn an_event_is_one_line() {
        let stamp = json!({"seconds": 5, "microseconds": 42});
        let event = json!({"event": "X", "timestamp": stamp, "data": {"id": "a b", "n": 1}});
        assert_eq!(line("X", &event), "5.000042 X id=\"a b\" n=1");
    }
}
