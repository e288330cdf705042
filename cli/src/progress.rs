//! Shows how far a transfer has come: a bar per layer on a terminal, nothing without a terminal.
//!
//! Bars go to standard error and are cleared at the end, so that only the result remains.

use std::collections::HashMap;

use berth_api::v1::{ImportProgress, LayerPhase, LayerProgress};
use indicatif::{MultiProgress, ProgressBar, ProgressDrawTarget, ProgressStyle};

use crate::names::short_id;

/// The most bars, more than fit on any screen: further layers are counted, not drawn.
const MOST_BARS: usize = 32;

/// The bars of one pull.
#[derive(Debug)]
pub(crate) struct LayerBars {
    screen: MultiProgress,
    bars: HashMap<String, ProgressBar>,
    bytes_done: HashMap<String, u64>,
}

impl LayerBars {
    /// No bars yet. Draws only if `visible` and standard error is a terminal.
    pub(crate) fn new(visible: bool) -> Self {
        let target = if visible { ProgressDrawTarget::stderr() } else { ProgressDrawTarget::hidden() };
        Self {
            screen: MultiProgress::with_draw_target(target),
            bars: HashMap::new(),
            bytes_done: HashMap::new(),
        }
    }

    /// Creates a bar for each layer, in the image's order.
    pub(crate) fn expect_layers(&mut self, digests: &[String]) {
        for digest in digests {
            self.bar(digest);
        }
    }

    /// Updates the bar of a layer.
    pub(crate) fn show(&mut self, layer: &LayerProgress) {
        self.bytes_done.insert(layer.digest.clone(), if loads(layer.phase()) { layer.bytes_done } else { 0 });
        let Some(bar) = self.bar(&layer.digest) else { return };
        bar.set_length(layer.bytes_total);
        bar.set_message(phase_text(layer.phase()));
        if is_end(layer.phase()) {
            bar.set_position(layer.bytes_total);
            bar.abandon();
        } else {
            bar.set_position(layer.bytes_done);
        }
    }

    /// Compressed bytes that were actually transferred.
    pub(crate) fn bytes_loaded(&self) -> u64 {
        self.bytes_done.values().fold(0, |sum, bytes| sum.saturating_add(*bytes))
    }

    fn bar(&mut self, digest: &str) -> Option<&ProgressBar> {
        if !self.bars.contains_key(digest) {
            if self.bars.len() >= MOST_BARS {
                return None;
            }
            let bar = self.screen.add(ProgressBar::new(0).with_style(styled(TEMPLATE)));
            bar.set_prefix(short_id(digest).to_owned());
            bar.set_message(phase_text(LayerPhase::Waiting));
            self.bars.insert(digest.to_owned(), bar);
        }
        self.bars.get(digest)
    }
}

impl Drop for LayerBars {
    fn drop(&mut self) {
        // Also after an error, so that its message does not follow half a bar. Fails only if the
        // terminal is gone.
        let _unseen = self.screen.clear();
    }
}

/// How far an import has come: a bar when the daemon knows the archive's size, else a count of
/// bytes.
#[derive(Debug)]
pub(crate) struct ArchiveBar {
    bar: ProgressBar,
}

impl ArchiveBar {
    /// Nothing has been read yet. Draws only if standard error is a terminal.
    pub(crate) fn new() -> Self {
        let bar = ProgressBar::with_draw_target(None, ProgressDrawTarget::stderr());
        Self { bar: bar.with_style(styled(COUNT_TEMPLATE)) }
    }

    /// Updates the bar.
    pub(crate) fn show(&self, progress: &ImportProgress) {
        if progress.bytes_total > 0 && self.bar.length() != Some(progress.bytes_total) {
            self.bar.set_style(styled(TEMPLATE));
            self.bar.set_prefix("archive");
            self.bar.set_length(progress.bytes_total);
        }
        self.bar.set_position(progress.bytes_done);
    }
}

impl Drop for ArchiveBar {
    fn drop(&mut self) {
        self.bar.finish_and_clear();
    }
}

/// The format of a bar.
const TEMPLATE: &str = "{prefix:12} {bar:30} {bytes:>10} / {total_bytes:10} {msg}";

/// The format if the total is unknown.
const COUNT_TEMPLATE: &str = "{spinner} {bytes} read";

fn styled(template: &str) -> ProgressStyle {
    // Templates are constants checked by a test, so the fallback is never used.
    ProgressStyle::with_template(template).unwrap_or_else(|_| ProgressStyle::default_bar())
}

fn phase_text(phase: LayerPhase) -> &'static str {
    match phase {
        LayerPhase::Unspecified => "",
        LayerPhase::Waiting => "waiting",
        LayerPhase::Downloading => "downloading",
        LayerPhase::Unpacking => "unpacking",
        LayerPhase::Done => "done",
        LayerPhase::Exists => "already here",
    }
}

fn is_end(phase: LayerPhase) -> bool {
    matches!(phase, LayerPhase::Done | LayerPhase::Exists)
}

fn loads(phase: LayerPhase) -> bool {
    matches!(phase, LayerPhase::Downloading | LayerPhase::Unpacking | LayerPhase::Done)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn layer(digest: &str, phase: LayerPhase, bytes_done: u64) -> LayerProgress {
        LayerProgress { digest: digest.into(), phase: phase.into(), bytes_done, bytes_total: 100 }
    }

    #[test]
    fn what_was_here_already_counts_as_not_loaded() {
        let mut bars = LayerBars::new(false);
        bars.expect_layers(&["sha256:a".into(), "sha256:b".into()]);
        bars.show(&layer("sha256:a", LayerPhase::Downloading, 40));
        bars.show(&layer("sha256:a", LayerPhase::Done, 100));
        bars.show(&layer("sha256:b", LayerPhase::Exists, 100));
        assert_eq!(bars.bytes_loaded(), 100);
    }

    #[test]
    fn layers_beyond_the_screen_are_counted() {
        let mut bars = LayerBars::new(false);
        for number in 0..100 {
            bars.show(&layer(&number.to_string(), LayerPhase::Done, 100));
        }
        assert_eq!((bars.bars.len(), bars.bytes_loaded()), (MOST_BARS, 10_000));
    }

    #[test]
    fn odd_numbers_do_not_confuse() {
        let mut bars = LayerBars::new(false);
        bars.show(&layer("", LayerPhase::Downloading, u64::MAX));
        bars.show(&LayerProgress { phase: 99, bytes_done: u64::MAX, ..layer("é", LayerPhase::Done, 0) });
        bars.show(&layer("x", LayerPhase::Done, 7));
        assert_eq!(bars.bytes_loaded(), u64::MAX);
    }

    #[test]
    fn an_archive_of_unknown_size_is_counted_until_the_size_is_known() {
        let bar = ArchiveBar::new();
        bar.show(&ImportProgress { bytes_done: 5, bytes_total: 0 });
        assert_eq!((bar.bar.position(), bar.bar.length()), (5, None));
        bar.show(&ImportProgress { bytes_done: 7, bytes_total: 9 });
        assert_eq!((bar.bar.position(), bar.bar.length()), (7, Some(9)));
    }

    #[test]
    fn the_templates_are_well_formed() {
        for template in [TEMPLATE, COUNT_TEMPLATE] {
            assert!(ProgressStyle::with_template(template).is_ok(), "{template}");
        }
    }
}
