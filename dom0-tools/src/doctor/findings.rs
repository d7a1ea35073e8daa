//! What is found, for people and for scripts.

use crate::text::without_controls;
use serde::{Deserialize, Serialize};
use std::fmt::{self, Display, Formatter};

/// How bad it is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Severity {
    /// Something works less well than it could, or will stop to.
    Warning,
    /// A guest does not have what it is to have, or no guest can.
    Fault,
}

impl Severity {
    fn word(self) -> &'static str {
        match self {
            Self::Warning => "warning",
            Self::Fault => "fault",
        }
    }
}

/// Something that is not as it should be.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Finding {
    pub severity: Severity,
    /// What it is about: a word, as `gntdev`, or a guest's device, as `guest ivi (3), virtio_disk/51712`. Scripts go by it.
    pub subject: String,
    pub what: String,
    /// Why it matters.
    pub why: String,
    /// What to do: a command, a line of a file, an option of a kernel.
    pub remedy: String,
}

impl Finding {
    fn new(
        severity: Severity,
        subject: impl Into<String>,
        what: impl Display,
        why: impl Display,
        remedy: impl Display,
    ) -> Self {
        // Names of guests and what back-ends say are others' text.
        let text = |text: &dyn Display| without_controls(text.to_string().chars());
        Self {
            severity,
            subject: text(&subject.into()),
            what: text(&what),
            why: text(&why),
            remedy: text(&remedy),
        }
    }

    pub(super) fn fault(
        subject: impl Into<String>,
        what: impl Display,
        why: impl Display,
        remedy: impl Display,
    ) -> Self {
        Self::new(Severity::Fault, subject, what, why, remedy)
    }

    pub(super) fn warning(
        subject: impl Into<String>,
        what: impl Display,
        why: impl Display,
        remedy: impl Display,
    ) -> Self {
        Self::new(Severity::Warning, subject, what, why, remedy)
    }
}

/// Something that was looked at, and is as it should be.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Fine {
    pub subject: String,
    pub what: String,
}

/// All that was looked at.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Diagnosis {
    pub findings: Vec<Finding>,
    pub fine: Vec<Fine>,
}

impl Diagnosis {
    /// Exit statuses of `xen-virtioctl doctor`: 1 and 2 are those of a command that has failed, or was not understood.
    const WARNINGS: u8 = 3;
    const FAULTS: u8 = 4;

    pub(super) fn find(&mut self, finding: Finding) {
        self.findings.push(finding);
    }

    pub(super) fn fine(&mut self, subject: impl Into<String>, what: impl Display) {
        self.fine.push(Fine {
            subject: without_controls(subject.into().chars()),
            what: without_controls(what.to_string().chars()),
        });
    }

    /// 0 if all is fine, 3 if there are warnings and no more, 4 if there is a fault.
    pub fn exit_status(&self) -> u8 {
        match self.findings.iter().map(|finding| finding.severity).max() {
            None => 0,
            Some(Severity::Warning) => Self::WARNINGS,
            Some(Severity::Fault) => Self::FAULTS,
        }
    }
}

impl Display for Diagnosis {
    /// Faults first.
    fn fmt(&self, f: &mut Formatter<'_>) -> fmt::Result {
        for severity in [Severity::Fault, Severity::Warning] {
            let findings = self.findings.iter();
            for finding in findings.filter(|finding| finding.severity == severity) {
                writeln!(
                    f,
                    "{}: {}: {}\n  why:    {}\n  remedy: {}\n",
                    severity.word(),
                    finding.subject,
                    finding.what,
                    finding.why,
                    finding.remedy
                )?;
            }
        }
        for Fine { subject, what } in &self.fine {
            writeln!(f, "fine: {subject}: {what}")?;
        }
        let count = |severity| {
            let findings = self.findings.iter();
            findings
                .filter(|finding| finding.severity == severity)
                .count()
        };
        writeln!(
            f,
            "{}{} looked at: {} fine, faults: {}, warnings: {}",
            if self.fine.is_empty() { "" } else { "\n" },
            self.fine.len() + self.findings.len(),
            self.fine.len(),
            count(Severity::Fault),
            count(Severity::Warning)
        )
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_worst_finding_is_the_exit_status_and_stands_first() {
        let mut diagnosis = Diagnosis::default();
        assert_eq!(diagnosis.exit_status(), 0);
        diagnosis.fine("xen", "4.20.4");
        assert_eq!(diagnosis.exit_status(), 0);
        diagnosis.find(Finding::warning(
            "xl",
            "is old",
            "it lacks words",
            "a new one",
        ));
        assert_eq!(diagnosis.exit_status(), 3);
        diagnosis.find(Finding::fault(
            "gntdev",
            "is \x1bnot there",
            "no guest",
            "modprobe",
        ));
        assert_eq!(diagnosis.exit_status(), 4);
        assert_eq!(
            diagnosis.to_string(),
            "fault: gntdev: is \u{fffd}not there\n  why:    no guest\n  remedy: modprobe\n\n\
             warning: xl: is old\n  why:    it lacks words\n  remedy: a new one\n\n\
             fine: xen: 4.20.4\n\n\
             3 looked at: 1 fine, faults: 1, warnings: 1\n"
        );
        let json = serde_json::to_string(&diagnosis).unwrap();
        assert_eq!(serde_json::from_str::<Diagnosis>(&json).unwrap(), diagnosis);
    }
}
