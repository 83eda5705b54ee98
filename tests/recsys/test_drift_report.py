from recsys.drift_report import Distribution, DriftReport, Finding, Moved


def report(directory, *findings):
    moved = Moved(bin="dk", reference=0.1, today=0.45)
    counted = Distribution(
        name="country", reference_values=300, today_values=200, num_bins=3, moved=(moved,)
    )
    return DriftReport(
        directory=directory,
        name="shop",
        model_version="3",
        reference="runs/monday/data",
        reference_users=300,
        users=200,
        k=20,
        sample_users=200,
        coverage=(0.5, 0.2),
        distributions=(counted,),
        findings=findings,
    )


def test_what_exceeds_its_limit_alarms_and_is_told_with_what_moved(tmp_path):
    above = Finding(of="country", measure="psi", found=0.61, allowed=0.25)
    at = Finding(of="country", measure="jensen_shannon", found=0.2, allowed=0.2)
    unasked = Finding(of="country", measure="unknown_rise", found=0.9, allowed=None)
    drop = Finding(of="recommended.coverage", measure="coverage_drop", found=0.6, allowed=0.2)
    saved = report(tmp_path, above, at, unasked, drop).save()
    loaded = DriftReport.load(tmp_path)
    assert loaded == saved
    assert loaded.alarms == [above, drop]
    assert loaded.alarm_lines() == [
        "psi of country: found 0.6100, allowed 0.2500 (dk 10.0% -> 45.0%)",
        "coverage_drop of recommended.coverage: found 0.6000, allowed 0.2000",
    ]
