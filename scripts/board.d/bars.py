"""A picture of speeds relative to xen-blkback's, as SVG."""

COLOURS = {"grants": "#2f6f9f", "frames": "#8fb8d8"}
ROW, LEFT, SCALE = 34, 250, 260


def picture(rows):
    """The picture of rows: what each is called, and its ratios by the names of COLOURS."""
    rows = list(rows)
    most = max(ratios[name] for _, ratios in rows for name in COLOURS)
    width, height = LEFT + SCALE * max(most, 1.2) + 60, ROW * len(rows) + 64
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{width:.0f}" height="{height}" '
        f'viewBox="0 0 {width:.0f} {height}" font-family="sans-serif" font-size="12">',
        f'<rect width="100%" height="100%" fill="white"/>',
        f'<text x="{LEFT}" y="16">speed relative to xen-blkback, same disk, same boot</text>',
    ]
    for index, (name, colour) in enumerate(COLOURS.items()):
        x = LEFT + 90 * index
        parts.append(f'<rect x="{x}" y="24" width="12" height="12" fill="{colour}"/>')
        parts.append(f'<text x="{x + 16}" y="34">{name}</text>')
    for index, (label, ratios) in enumerate(rows):
        y = 48 + ROW * index
        parts.append(f'<text x="{LEFT - 8}" y="{y + 17}" text-anchor="end">{label}</text>')
        for line, (name, colour) in enumerate(COLOURS.items()):
            ratio = ratios[name]
            top = y + 1 + 13 * line
            parts.append(f'<rect x="{LEFT}" y="{top}" width="{SCALE * ratio:.0f}" height="12" fill="{colour}"/>')
            parts.append(f'<text x="{LEFT + SCALE * ratio + 4:.0f}" y="{top + 10}" font-size="10">{ratio:.2f}</text>')
    x = LEFT + SCALE
    parts.append(f'<line x1="{x}" y1="42" x2="{x}" y2="{height - 14}" stroke="#c03030" stroke-dasharray="4 3"/>')
    parts.append(f'<text x="{x}" y="{height - 3}" text-anchor="middle" font-size="10">xen-blkback</text>')
    return "\n".join(parts + ["</svg>"]) + "\n"
