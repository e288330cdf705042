//! Formats CRI timestamps (nanoseconds since the epoch) as an age or a date.
//!
//! Pure functions, except for the one that reads the clock.

use std::time::{Duration, SystemTime, UNIX_EPOCH};

/// Now, in nanoseconds since the epoch; 0 if the clock is set to before it.
pub(crate) fn now_unix_ns() -> i64 {
    let since_epoch = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or(Duration::ZERO);
    i64::try_from(since_epoch.as_nanos()).unwrap_or(i64::MAX)
}

/// Formats the time from `then_unix_ns` to `now_unix_ns` with one unit, such as `5m`; `-` without a
/// start.
///
/// A start in the future counts as now: clocks can be set back.
pub(crate) fn age_text(then_unix_ns: i64, now_unix_ns: i64) -> String {
    if then_unix_ns <= 0 {
        return "-".into();
    }
    let seconds = (now_unix_ns.saturating_sub(then_unix_ns) / 1_000_000_000).max(0);
    match seconds {
        0..120 => format!("{seconds}s"),
        120..7200 => format!("{}m", seconds / 60),
        7200..172_800 => format!("{}h", seconds / 3600),
        _ => format!("{}d", seconds / 86_400),
    }
}

/// Formats a time in UTC as RFC 3339 with nanoseconds; empty for 0, which the CRI uses for "not
/// yet".
pub(crate) fn rfc3339(unix_ns: i64) -> String {
    if unix_ns == 0 {
        return String::new();
    }
    let (seconds, nanoseconds) = (unix_ns.div_euclid(1_000_000_000), unix_ns.rem_euclid(1_000_000_000));
    let (days, second_of_day) = (seconds.div_euclid(86_400), seconds.rem_euclid(86_400));
    let (year, month, day) = date_of_day(days);
    let (hour, minute, second) = (second_of_day / 3600, second_of_day / 60 % 60, second_of_day % 60);
    format!("{year:04}-{month:02}-{day:02}T{hour:02}:{minute:02}:{second:02}.{nanoseconds:09}Z")
}

/// Year, month and day in the Gregorian calendar of a day counted from 1970-01-01.
///
/// Counts years from March, so that the leap day is the last of its year and months have a regular
/// rhythm of 153 days in five.
fn date_of_day(days: i64) -> (i64, i64, i64) {
    const DAYS_IN_400_YEARS: i64 = 146_097;
    const DAYS_FROM_MARCH_OF_YEAR_0_TO_1970: i64 = 719_468;
    let day = days + DAYS_FROM_MARCH_OF_YEAR_0_TO_1970;
    let (era, day) = (day.div_euclid(DAYS_IN_400_YEARS), day.rem_euclid(DAYS_IN_400_YEARS));
    let year_of_era = (day - day / 1460 + day / 36_524 - day / 146_096) / 365;
    let day_of_year = day - (365 * year_of_era + year_of_era / 4 - year_of_era / 100);
    let month_from_march = (5 * day_of_year + 2) / 153;
    let day_of_month = day_of_year - (153 * month_from_march + 2) / 5 + 1;
    let month = if month_from_march < 10 { month_from_march + 3 } else { month_from_march - 9 };
    let year = era * 400 + year_of_era + i64::from(month <= 2);
    (year, month, day_of_month)
}

#[cfg(test)]
mod tests {
    use super::*;

    const SECOND: i64 = 1_000_000_000;

    #[test]
    fn an_age_has_one_unit() {
        let now = 1_000_000 * SECOND;
        for (seconds, text) in [
            (0, "0s"),
            (119, "119s"),
            (120, "2m"),
            (7199, "119m"),
            (7200, "2h"),
            (172_799, "47h"),
            (172_800, "2d"),
        ] {
            assert_eq!(age_text(now - seconds * SECOND, now), text);
        }
    }

    #[test]
    fn an_age_without_a_start_or_from_the_future_does_not_confuse() {
        assert_eq!(age_text(0, 5 * SECOND), "-");
        assert_eq!(age_text(-1, 5 * SECOND), "-");
        assert_eq!(age_text(10 * SECOND, 5 * SECOND), "0s");
        assert_eq!(age_text(1, i64::MAX), "106751d");
    }

    #[test]
    fn dates_agree_with_the_calendar() {
        for (unix_ns, text) in [
            (0, ""),
            (1, "1970-01-01T00:00:00.000000001Z"),
            (951_782_400 * SECOND, "2000-02-29T00:00:00.000000000Z"),
            (1_709_251_199 * SECOND + 999_999_999, "2024-02-29T23:59:59.999999999Z"),
            (1_709_251_200 * SECOND, "2024-03-01T00:00:00.000000000Z"),
            (4_107_542_400 * SECOND, "2100-03-01T00:00:00.000000000Z"),
            (-SECOND, "1969-12-31T23:59:59.000000000Z"),
            (i64::MAX, "2262-04-11T23:47:16.854775807Z"),
        ] {
            assert_eq!(rfc3339(unix_ns), text);
        }
    }
}
