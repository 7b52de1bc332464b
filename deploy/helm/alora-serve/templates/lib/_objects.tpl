{{/* What several components have alike. All take the dict of a component (see _helpers.tpl). */}}

{{- define "alora-serve.metadata" -}}
metadata:
  name: {{ include "alora-serve.name" . }}
  namespace: {{ .ctx.Release.Namespace }}
  labels:
    {{- include "alora-serve.labels" . | nindent 4 }}
{{- end }}

{{/* "kubernetes.io/h2c" is HTTP/2 without TLS, for gateways that would otherwise speak HTTP/1.1 to the pods. */}}
{{- define "alora-serve.appProtocol" -}}
{{ .Values.tls.enabled | ternary "https" "kubernetes.io/h2c" }}
{{- end }}

{{/* A name that stands for every ready pod. Takes the suffix of its name, too. */}}
{{- define "alora-serve.headlessService" -}}
apiVersion: v1
kind: Service
metadata:
  name: {{ include "alora-serve.name" . }}{{ .suffix }}
  namespace: {{ .ctx.Release.Namespace }}
  labels:
    {{- include "alora-serve.labels" . | nindent 4 }}
spec:
  clusterIP: None
  selector:
    {{- include "alora-serve.selectorLabels" . | nindent 4 }}
  ports:
    - name: grpc
      port: 50051
      targetPort: grpc
      appProtocol: {{ include "alora-serve.appProtocol" .ctx }}
    - name: metrics
      port: 9090
      targetPort: metrics
{{- end }}

{{- define "alora-serve.pdb" -}}
{{- if .values.pdb.enabled -}}
apiVersion: policy/v1
kind: PodDisruptionBudget
{{ include "alora-serve.metadata" . }}
spec:
  maxUnavailable: {{ .values.pdb.maxUnavailable }}
  # A pod that does not serve must not keep a node from being drained.
  unhealthyPodEvictionPolicy: AlwaysAllow
  selector:
    matchLabels:
      {{- include "alora-serve.selectorLabels" . | nindent 6 }}
{{- end }}
{{- end }}

{{/* Rules and dashboards tell jobs apart by how their names end. */}}
{{- define "alora-serve.serviceMonitor" -}}
{{- with .ctx.Values.monitoring.serviceMonitor }}
{{- if .enabled -}}
apiVersion: monitoring.coreos.com/v1
kind: ServiceMonitor
{{ include "alora-serve.metadata" $ }}
    {{- with $.ctx.Values.monitoring.labels }}
    {{- toYaml . | nindent 4 }}
    {{- end }}
spec:
  selector:
    matchLabels:
      {{- include "alora-serve.selectorLabels" $ | nindent 6 }}
  endpoints:
    - port: metrics
      interval: {{ .interval }}
      scrapeTimeout: {{ .scrapeTimeout }}
      relabelings:
        - {action: replace, targetLabel: job, replacement: {{ include "alora-serve.name" $ }}}
      # For endpoint pickers, which scrape pods themselves: the labels are the adapters of the moment.
      metricRelabelings:
        - {action: drop, sourceLabels: [__name__], regex: "vllm:.*"}
{{- end }}
{{- end }}
{{- end }}

{{- define "alora-serve.autoscaler" -}}
{{- if .values.autoscaling.enabled -}}
{{- include (printf "alora-serve.%s" .ctx.Values.autoscaling.type) . }}
{{- end }}
{{- end }}

{{- define "alora-serve.hpa" -}}
apiVersion: autoscaling/v2
kind: HorizontalPodAutoscaler
{{ include "alora-serve.metadata" . }}
spec:
  scaleTargetRef:
    apiVersion: apps/v1
    kind: {{ .values.kind | default "Deployment" }}
    name: {{ include "alora-serve.name" . }}
  minReplicas: {{ .values.autoscaling.minReplicas }}
  maxReplicas: {{ .values.autoscaling.maxReplicas }}
  metrics:
    {{- range .values.autoscaling.metrics }}
    - type: Pods
      pods:
        metric: {name: {{ .name }}}
        target: {type: AverageValue, averageValue: {{ int64 .target | toString | quote }}}
    {{- end }}
  {{- with .values.autoscaling.behavior }}
  behavior:
    {{- toYaml . | nindent 4 }}
  {{- end }}
{{- end }}

{{/* The sum over pods; KEDA's HorizontalPodAutoscaler divides it by their number. */}}
{{- define "alora-serve.keda" -}}
{{- $job := include "alora-serve.name" . -}}
{{- $namespace := .ctx.Release.Namespace -}}
{{- $keda := .ctx.Values.autoscaling.keda -}}
apiVersion: keda.sh/v1alpha1
kind: ScaledObject
{{ include "alora-serve.metadata" . }}
spec:
  scaleTargetRef:
    apiVersion: apps/v1
    kind: {{ .values.kind | default "Deployment" }}
    name: {{ $job }}
  minReplicaCount: {{ .values.autoscaling.minReplicas }}
  maxReplicaCount: {{ .values.autoscaling.maxReplicas }}
  pollingInterval: {{ $keda.pollingInterval }}
  cooldownPeriod: {{ $keda.cooldownPeriod }}
  # Without Prometheus, or these series in it, as many as there must always be; never fewer than there are.
  fallback: {failureThreshold: 3, replicas: {{ .values.autoscaling.minReplicas }}, behavior: currentReplicasIfHigher}
  {{- with .values.autoscaling.behavior }}
  advanced:
    horizontalPodAutoscalerConfig:
      behavior:
        {{- toYaml . | nindent 8 }}
  {{- end }}
  triggers:
    {{- range .values.autoscaling.metrics }}
    - type: prometheus
      metricType: AverageValue
      metadata:
        serverAddress: {{ $keda.prometheusAddress }}
        query: sum({{ .name }}{namespace="{{ $namespace }}", job="{{ $job }}"})
        threshold: {{ int64 .target | toString | quote }}
        # Else what is not scraped would be 0, and end all replicas but the fewest.
        ignoreNullValues: "false"
        {{- with $keda.authModes }}
        authModes: {{ . | quote }}
        {{- end }}
      {{- with $keda.authenticationRef }}
      authenticationRef: {name: {{ . }}}
      {{- end }}
    {{- end }}
{{- end }}
