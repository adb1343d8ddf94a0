"use strict";
// The sample sliders: each run shows its last grid up to the step.
for (const gallery of document.querySelectorAll(".gallery")) {
  const steps = JSON.parse(gallery.dataset.steps), slider = gallery.querySelector("input");
  if (!slider) continue;
  slider.addEventListener("input", () => {
    const step = steps[slider.value];
    gallery.querySelector("output").textContent = "step " + step;
    for (const group of gallery.querySelectorAll(".pictures")) {
      const pictures = [...group.querySelectorAll("img")], label = group.querySelector("h3 span");
      const shown = pictures.findLast((picture) => Number(picture.dataset.step) <= step) || pictures[0];
      for (const picture of pictures) picture.hidden = picture !== shown;
      if (label) label.textContent = "step " + shown.dataset.step;
    }
  });
}
// The running mean of the smoothed lines, taken twice as chart.py does.
function smooth(points, reach) {
  const last = points.length - 1, sums = [0];
  for (const point of points) sums.push(sums[sums.length - 1] + point[1]);
  return points.map(([x], index) => {
    const side = Math.min(reach, index, last - index), low = index - side, high = index + side + 1;
    return [x, Number(((sums[high] - sums[low]) / (high - low)).toPrecision(5))];
  });
}
// The charts' cursor: the values at the step under the pointer.
for (const chart of document.querySelectorAll(".chart")) {
  const svg = chart.querySelector("svg"), cursor = chart.querySelector(".cursor"), output = chart.querySelector("output");
  const low = Number(chart.dataset.low), high = Number(chart.dataset.high), series = JSON.parse(chart.dataset.series);
  const view = svg.viewBox.baseVal, left = PLOT_LEFT, right = view.width - PLOT_RIGHT;
  const [bottom, top, start, end, isLog] = JSON.parse(chart.dataset.y), scale = isLog ? Math.log10 : Number;
  const across = (x) => left + (x - low) / (high - low) * (right - left);
  const up = (y) => start + (scale(y) - scale(bottom)) / (scale(top) - scale(bottom)) * (end - start);
  const slider = chart.closest("section").querySelector(".smoothing input"), lines = svg.querySelectorAll("path.line");
  if (slider) slider.addEventListener("input", () => series.forEach((line, index) => {
    if (!line.raw) return;
    const reach = Number(slider.value) && Math.max(1, Math.floor(line.raw.length * slider.value / 600));
    line.points = smooth(smooth(line.raw, reach), reach);
    const places = line.points.map(([x, y]) => across(x).toFixed(1) + " " + up(y).toFixed(1));
    lines[index].setAttribute("d", "M" + places.join("L"));
  }));
  svg.addEventListener("pointermove", (event) => {
    const box = svg.getBoundingClientRect();
    const x = Math.min(Math.max((event.clientX - box.left) / box.width * view.width, left), right);
    const step = low + (x - left) / (right - left) * (high - low);
    const nearest = series.map((line) => line.points.reduce((a, b) => Math.abs(b[0] - step) < Math.abs(a[0] - step) ? b : a));
    const values = nearest.map((point, i) => (series.length > 1 ? series[i].name + " " : "") + point[1]);
    output.textContent = "step " + nearest[0][0] + ": " + values.join(", ");
    cursor.setAttribute("x1", x);
    cursor.setAttribute("x2", x);
    cursor.style.visibility = "visible";
  });
  svg.addEventListener("pointerleave", () => { cursor.style.visibility = "hidden"; output.textContent = ""; });
}
